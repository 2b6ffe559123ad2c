from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from agile.errors import AgileError
from agile.session_log import JsonLines, append_sessions, read_lines, session_from_json
from agile.types import Action, Fn, Session, to_json
from tests.worlds import Replay, item, make_codec, make_executor, play, script

ASK = (
    Action(Fn.SEEK_ADVICE),
    Action(Fn.REFLECTION, 'steel\u2028 \N{SNOWMAN} "is" washable'),
    Action(Fn.PREDICT_ANSWER, "yes"),
)


def sessions() -> list[Session]:
    codec = make_codec()
    advised = play(make_executor(), script(codec, *ASK), item("is it\nwashable \ud800 ?"))
    failed = play(make_executor(), Replay([]))
    spelled = [codec.action_ids[Fn.PREDICT_ANSWER], *codec.encode("y"), *codec.encode("es"), codec.end_id]
    sampled = play(make_executor(), Replay([spelled]))
    return [advised, failed, sampled, replace(sampled, reward=None, retrieved=((3, 1 / 3), (4, -0.1)), written=(7,))]


@pytest.mark.parametrize("number", range(4))
def test_a_session_survives_json(number: int) -> None:
    session = sessions()[number]
    assert session_from_json(json.loads(json.dumps(to_json(session)))) == session


def test_logged_sessions_come_back_in_order_with_their_tags(tmp_path: Path) -> None:
    path, written = tmp_path / "sessions-0.jsonl", sessions()
    for part in (written[:2], written[2:]):  # opened again, it goes on
        log = JsonLines(path)
        append_sessions(log, part, step=len(part), stage="ppo")
        assert path.stat().st_size == log.size, "on disk when append returns"
        log.close()
    records = list(read_lines(path))
    assert [session_from_json(r["session"]) for r in records] == written
    assert {(r["step"], r["stage"]) for r in records} == {(2, "ppo")}
    assert len(path.read_text().splitlines()) >= 4 and path.read_bytes().count(b"\n") == 4, "one line each"


@pytest.mark.parametrize("kept", [1, 5, 8])
def test_a_torn_last_line_is_skipped_with_a_warning(
    tmp_path: Path, kept: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":2}\n' + b'{"a":"\xc3\xa9"}'[:kept])
    with caplog.at_level(logging.WARNING):
        assert list(read_lines(path)) == [{"a": 1}, {"a": 2}]
    (record,) = caplog.records
    assert str(path) in record.getMessage() and "torn" in record.getMessage()


@pytest.mark.parametrize("bad", [b'{"a":', b"\xff\xfe", b"\x00\x00"])
def test_a_corrupt_line_before_the_last_is_an_error_that_names_it(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a":1}\n' + bad + b'\n{"a":2}\n')
    with pytest.raises(AgileError, match=r"log\.jsonl, line 2: expected a JSON object"):
        list(read_lines(path))


def test_a_missing_log_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(AgileError, match=r"Cannot read .*log\.jsonl"):
        list(read_lines(tmp_path / "log.jsonl"))


def test_truncate_drops_what_followed_and_appends_there(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonLines(path)
    log.append([{"a": 1}])
    size = log.size
    log.append([{"a": 2}, {"a": 3}])
    with path.open("ab") as torn:
        torn.write(b'{"a":')
    log.truncate(size)
    log.append([{"a": 4}])
    log.close()
    assert list(read_lines(path)) == [{"a": 1}, {"a": 4}]


def test_an_empty_log_holds_nothing(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    assert (log.size, list(read_lines(log.path))) == (0, [])
