"""Wiring: from a config to the objects of a run. With `make_task` the only module of the core that knows
concrete agents and tasks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import get_console
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from agile import ranks
from agile.advice import AdviceDesk
from agile.agents.answer import AnswerAgent
from agile.agents.hotpot_qa import SEARCH, HotPotQAAgent
from agile.agents.multiple_choice import MultipleChoiceAgent
from agile.agents.own_qa import OwnQAAgent, own_spec
from agile.agents.product_qa import ProductQAAgent
from agile.baselines import BaselineRun, run_baselines
from agile.batching import Row, session_rows
from agile.chat_template import bos_ids, chat_turns
from agile.config import ExpertConfig, RunConfig
from agile.errors import AgileError
from agile.executor import Executor, Limits
from agile.experts import make_advisor, recorded_answers
from agile.extras import needs
from agile.from_desk import SESSIONS, imitated
from agile.imitation import Imitation, jobs
from agile.judge import judged
from agile.lora import adapter_config, add_adapter, is_adapted
from agile.make_task import make_task
from agile.memory.encoders import CachedEncoder, make_encoder
from agile.memory.store import SqliteMemory
from agile.messages import MessagesCodec, messages_tokenizer
from agile.model import check_context, load_lm, load_tokenizer, small_llama
from agile.policies import HFPolicy
from agile.policies.vllm import VLLMPolicy
from agile.policies.vllm_server import VLLMServerPolicy
from agile.prompted import prompted_policy
from agile.prompts import instructions
from agile.protocols import Advisor, Agent, Memory, Policy, Task, TeachableAgent, TrainablePolicy
from agile.run_folder import writing
from agile.seeding import derive_seed
from agile.tasks.desk import QUESTIONS, DeskTask
from agile.tasks.hotpotqa import HotPotQA
from agile.tokens import ActionCodec, Turns, add_action_tokens, build_tokenizer
from agile.tools.passages import MAX_SEARCHES
from agile.types import AgentSpec, Item, Stream, Trajectory


@dataclass
class Setup:
    """What a config describes, made when first used.

    Args:
        config: The checked config.
        folder: The run folder: MiniShop's worlds are written to `minishop` there, embeddings kept beside it.
        verdicts: What `sft.judge` said of train questions but searches, or if the stronger model was right, by id.
    """

    config: RunConfig
    folder: Path
    verdicts: Mapping[str, bool] | None = None
    _bad_answers: list[str] = field(default_factory=list, init=False, repr=False)

    @cached_property
    def task(self) -> Task:
        """The task, or what people asked of it at a desk: that is taken from the desk's database once."""
        desk, task = self.config.task.desk, self.config.task
        if desk is None:
            return self._own_task
        path = self.folder / QUESTIONS
        if not path.exists():
            with needs("serve"):
                from agile.serve.export import export_desk

            counts = export_desk(desk, self._own_task, path, self.folder / SESSIONS)
            told = ", ".join(f"{number:,} by {how}" for how, number in sorted(counts.items()))
            get_console().print(f"{sum(counts.values()):,} questions of {desk.served} with an answer: {told}")
        return DeskTask(path, self._own_task, stream_length=task.stream_length, advice_counts=task.advice_counts)

    @cached_property
    def _own_task(self) -> Task:
        return make_task(self.config, self.folder, self._predicted(), lambda texts: self.encoder.encode(texts))

    @cached_property
    def train_streams(self) -> Sequence[Stream]:
        """What is learned from: all train streams but those set aside for validation."""
        streams = self.task.streams("train")
        self.tell_skipped()
        if self.config.task.validation_data is not None:
            return streams
        return streams[: len(streams) - len(self.validation_streams)]

    @property
    def skipped(self) -> list[str]:
        """What is wrong with each row that was left out, of questions and of recorded answers."""
        return list(dict.fromkeys([*self.task.skipped, *self._bad_answers]))

    def tell_skipped(self) -> None:
        """List rows that were left out in `skipped_rows.txt`, and say how many."""
        if (skipped := self.skipped) and ranks.is_main():
            path = self.folder / "skipped_rows.txt"
            with writing(path):
                path.write_text("".join(f"{row}\n" for row in skipped), encoding="utf-8")
            get_console().print(f"{len(skipped)} bad rows left out, see {path}. The first: {skipped[0]}", markup=False)

    @cached_property
    def validation_streams(self) -> Sequence[Stream]:
        """Those of `task.validation_data`, or the last train streams, if the config asks for validation.

        Raises:
            AgileError: None would be left to learn from.
        """
        streams, validation = self.task.streams("train"), self.config.validation
        if not validation.every:
            return ()
        if self.config.task.validation_data is not None:
            return self.task.streams("validation")[: validation.num_streams]
        num = validation.num_streams or min(8, max(1, len(streams) // 10))
        if num >= len(streams):
            raise AgileError(
                f"validation.num_streams is {num}, but there are {len(streams)} train streams, and some must be left "
                "to learn from. Lower validation.num_streams, or take more train groups or worlds."
            )
        return streams[-num:]

    @property
    def imitated_streams(self) -> Sequence[Stream]:
        """What imitation learns from."""
        return self.train_streams if self.config.task.imitation_data is None else self.task.streams("imitation")

    @cached_property
    def agent(self) -> TeachableAgent:
        match self.config.task.name:
            case "minishop" | "productqa":
                return ProductQAAgent(**self.config.agent.model_dump())
            case "medmcqa":
                return MultipleChoiceAgent(**self.config.agent.model_dump(exclude={"show_schema"}))
            case "hotpotqa":
                return HotPotQAAgent(show_price=self.config.agent.show_price, dense=self.config.task.search == "dense")
            case "jsonl":
                table = self.config.task.database is not None
                shown = {**self.config.agent.model_dump(), "show_schema": table}
                return OwnQAAgent(**shown, spec=own_spec(table=table))
            case "rft":
                return AnswerAgent()

    @cached_property
    def encoder(self) -> CachedEncoder:
        """Caches in `<folder>/embeddings.sqlite` by default, so that no text of a run is embedded twice."""
        cache = self.config.memory.cache or self.folder / "embeddings.sqlite"
        with writing(cache.parent):
            cache.parent.mkdir(parents=True, exist_ok=True)
        return make_encoder(self.config.memory.encoder, cache)

    def embed(self, streams: Sequence[Stream]) -> None:
        """Embed all that these streams can look up, in batches, before sessions ask for it one by one."""
        items = [item for stream in streams for item in stream.items]
        texts = [text for item in items for text in self.agent.embedded_texts(item)]
        self.encoder.encode(list(dict.fromkeys(texts)))

    def memory(self, stream: Stream | None = None) -> Memory:
        """An empty memory, or one with train questions of other streams where `task.preload` asks for them."""
        memory = SqliteMemory(self.encoder)
        if num_known := self.config.task.preload:
            others = [s for s in self.task.streams("train") if stream is None or s.id != stream.id.partition("#")[0]]
            items = [item for other in others for item in other.items]
            rng = np.random.default_rng(derive_seed(self.config.seed, "preload", "" if stream is None else stream.id))
            chosen = sorted(rng.permutation(len(items))[:num_known])
            memory.write([entry for i in chosen for entry in self.agent.lessons(items[i])])
        return memory

    def advisor(self, name: str | None = None) -> Advisor:
        """One of the config's experts, the one who advises by default."""
        expert = self.config.experts.get(name or self.config.expert, ExpertConfig())
        return make_advisor(
            expert,
            recorded=self.recorded,
            seed=self.config.seed,
            question=lambda item: self.agent.question(item, 0.0, 1.0),
            folder=self.folder,
            fallback=None if expert.fallback is None else self.advisor(expert.fallback),
        )

    def _predicted(self) -> Mapping[str, str | None] | None:
        """What a stronger model answered to train questions, if that is recorded."""
        name = self.config.sft.stronger_model
        return None if name is None or self.asks_stronger_model else self._recorded(self.config.experts[name], {})

    @property
    def asks_stronger_model(self) -> bool:
        """Whether the stronger model is behind an endpoint, so that `agile sft-data` has to ask it."""
        name = self.config.sft.stronger_model
        return name is not None and self.config.experts[name].kind == "model"

    def recorded(self, expert: ExpertConfig) -> Mapping[str, str | None]:
        """The answers of a recorded expert; those to test questions with options must be one of them."""
        items = (item for stream in self.task.streams("test") for item in stream.items)
        return self._recorded(expert, {item.id: item for item in items})

    def _recorded(self, expert: ExpertConfig, questions: Mapping[str, Item]) -> Mapping[str, str | None]:
        task = self.config.task
        return recorded_answers(expert, task.data, self._bad_answers if task.skip_bad_rows else None, questions)

    # ---------------------------------------------------------------------------------------------------------------

    def tokenizer(self, saved: Path | None = None) -> PreTrainedTokenizerFast:
        """The tokenizer saved with a model, the one of `model.path`, or a small one trained on the train streams."""
        model = self.config.model
        source = saved or (Path(model.path) if model.path else None)
        if source is None:
            streams = [*self.train_streams, *(self.imitated_streams if self.config.task.imitation_data else ())]
            texts = self.agent.corpus([item for stream in streams for item in stream.items])
            if self.config.prompt.format == "messages":
                return messages_tokenizer(model.tokenizer, texts, model.vocab_size)
            return build_tokenizer(model.tokenizer, texts, self.agent.spec, model.vocab_size)
        tokenizer = load_tokenizer(str(source))
        if saved is None and self.config.prompt.special_tokens:
            add_action_tokens(tokenizer, self.agent.spec)
        return tokenizer

    def carrier(self) -> PreTrainedTokenizerFast:
        """A tokenizer that has tokens for every text, for agents that no model of this project reads."""
        items = [item for stream in self.task.streams("test") for item in stream.items[:100]]
        return build_tokenizer("bpe", self.agent.corpus(items), self.agent.spec)

    def language_model(self, tokenizer: PreTrainedTokenizerFast, saved: Path | None = None) -> PreTrainedModel:
        """The model saved at a checkpoint, the one of `model.path`, or a small Llama with random weights.

        In `engine.dtype`, whatever it was saved in.
        """
        model, dtype = self.config.model, self.config.engine.dtype
        if path := saved or model.path:
            try:
                lm = load_lm(str(path), tokenizer, grow=saved is None, dtype=dtype)
                check_context(lm.config, self.config.rollout.max_context_tokens)
                return lm
            except AgileError as error:
                if "mismatched_sizes" not in str(error):
                    raise
                raise AgileError(
                    f"The weights in {path} are of another shape than its config.json says. Take both from one run."
                ) from error
            except Exception as error:  # files may be torn in any way, and safetensors has errors of its own
                raise AgileError(f"Cannot load the model {path}: {error}. Copy it again, or train it again.") from error
        lm = small_llama(
            tokenizer,
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_heads=model.num_heads,
            max_tokens=self.config.rollout.max_context_tokens,
            seed=self.config.seed,
        )
        torch.nn.Module.to(lm, dtype=getattr(torch, dtype))
        return lm

    def trained_model(self, tokenizer: PreTrainedTokenizerFast, saved: Path | None = None) -> PreTrainedModel:
        """`language_model` as it is trained: with an adapter that changes nothing yet, where the config asks for one.

        Rows of action tokens learn beside the adapter: a model that was given them knows nothing of them.
        """
        lm, lora = self.language_model(tokenizer, saved), self.config.lora
        if lora is not None:
            actions = self.agent.spec.actions if self.config.prompt.special_tokens else ()
            add_adapter(
                lm,
                rank=lora.rank,
                alpha=lora.alpha,
                target_modules=lora.target_modules,
                token_ids=[tokenizer.vocab[a.token] for a in actions],
            )
        return lm

    def policy(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        folder: Path,
        *,
        temperature: float,
    ) -> TrainablePolicy:
        """What samples for a language model, by `rollout.policy`.

        Args:
            lm: The model in this process.
            folder: The same model on disk; engines start from it.
        """
        rollout, vllm = self.config.rollout, self.config.vllm
        # vLLM's own `auto` takes a model of float32 for one of bfloat16
        dtype = str(lm.dtype).removeprefix("torch.") if vllm.dtype == "auto" else vllm.dtype
        if rollout.policy == "hf":
            return HFPolicy(
                lm,
                temperature=temperature,
                max_batch_size=rollout.max_batch_size,
            )
        if rollout.policy == "vllm":
            return VLLMPolicy(
                folder,
                num_tokens=len(tokenizer),
                dtype=dtype,
                max_model_len=rollout.max_context_tokens,
                max_num_seqs=rollout.max_batch_size,
                temperature=temperature,
                kv_cache_gib=vllm.kv_cache_gib,
                gpu_memory_utilization=vllm.gpu_memory_utilization,
                enforce_eager=vllm.enforce_eager,
                block_size=vllm.block_size,
                adapter=adapter_config(lm, str(folder)) if self.config.swaps_adapters and is_adapted(lm) else None,
            )
        return VLLMServerPolicy(
            folder,
            vllm.servers,
            num_tokens=len(tokenizer),
            name=vllm.name,
            dtype=dtype,
            max_model_len=rollout.max_context_tokens,
            temperature=temperature,
            weights_dir=vllm.weights_dir,
            timeout_s=vllm.timeout_s,
        )

    def greedy(self, tokenizer: PreTrainedTokenizerFast, folder: Path) -> TrainablePolicy:
        """The policy that plays the agent saved in `folder`, without sampling."""
        lm = self.language_model(tokenizer, folder)
        policy = self.policy(lm, tokenizer, folder, temperature=0.0)
        if self.config.rollout.policy == "vllm-server":  # whatever the servers were started from or trained with
            policy.update_weights(lm.named_parameters(remove_duplicate=False), 0)
        return policy

    def codec(self, tokenizer: PreTrainedTokenizerFast, spec: AgentSpec | None = None) -> ActionCodec:
        """Tokenizer, actions and prompt format.

        Args:
            spec: A table of actions that is not the agent's whole one.

        Raises:
            AgileError: The chat template cannot be extended turn by turn, see `agile.chat_template`.
        """
        prompt, spec = self.config.prompt, spec or self.agent.spec
        if prompt.format == "messages":
            return MessagesCodec(tokenizer, spec, prompt.template_options)
        price = None if self.agent.show_price else self.config.task.advice_price
        told = "" if prompt.instructions == "none" else instructions(spec, price)
        keep = prompt.thinking == "keep"
        if prompt.format == "chat":
            turns, end_id = chat_turns(
                tokenizer,
                instructions=told,
                role="system" if prompt.instructions == "system" else "user",
                keep_thinking=keep,
                options=prompt.template_options,
            )
            return ActionCodec(tokenizer, spec, special_tokens=prompt.special_tokens, turns=turns, end_id=end_id)
        opening = (
            *bos_ids(tokenizer),
            *tokenizer(f"{told}\n\n" if told else "", add_special_tokens=False)["input_ids"],
        )
        turns = Turns(opening=opening, keep_thinking=keep)
        return ActionCodec(tokenizer, spec, special_tokens=prompt.special_tokens, turns=turns)

    def executor(
        self,
        tokenizer: PreTrainedTokenizerFast,
        advisor: Advisor | None = None,
        codec: ActionCodec | None = None,
        *,
        agent: Agent | None = None,
        counterfactual: bool = False,
    ) -> Executor:
        rollout, agent = self.config.rollout, agent or self.agent
        return Executor(
            agent,
            codec or self.codec(tokenizer, agent.spec),
            self.task.tools,
            AdviceDesk(advisor or self.advisor(), self.config.task.advice_price),
            self.task.score,
            Limits(
                max_turns=rollout.max_turns,
                max_session_tokens=rollout.max_session_tokens,
                max_context_tokens=rollout.max_context_tokens,
                max_action_tokens=rollout.max_action_tokens,
                max_invalid_actions=rollout.max_invalid_actions,
                max_stage_s=rollout.max_stage_s,
            ),
            counterfactual=counterfactual,
        )

    def imitation(self, executor: Executor) -> Imitation:
        """How sessions to imitate are made: by the agent's teacher, or a model behind an endpoint."""
        sft, task = self.config.sft, self.config.task
        model, close = None, None
        if sft.teacher is not None:
            carrier = self.carrier()
            writer = self.executor(carrier, codec=ActionCodec(carrier, self.agent.spec))
            writer.limits = replace(writer.limits, max_stage_s=None)  # the endpoint has a patience of its own
            policy = prompted_policy(sft.teacher, writer.codec, task.advice_price, self.folder, "sft.teacher")
            model, close = (writer, policy), policy.endpoint.close

        def teach(item: Item, memory: Memory, price: float, rng: np.random.Generator) -> Policy:
            passes = sft.judge_yes if self.verdicts is None else float(self.verdicts.get(item.id, False))
            return self.agent.teacher(executor.codec, passes).policy(item, memory, price, rng)

        return Imitation(
            executor,
            teach,
            self.agent.initial_memory,
            self.memory,
            prices=task.training_prices or (task.advice_price,),
            seed=self.config.seed,
            model=model,
            close=close,
            max_calls={SEARCH: MAX_SEARCHES} if task.name == "hotpotqa" else {},
        )

    def imitation_rows(self, executor: Executor) -> list[Row]:
        """What imitation learns from: the teacher's sessions on the train streams, or those that people asked for."""
        if self.config.task.desk is not None:
            sessions, counts = imitated(self.folder / SESSIONS, executor.codec)
            if ranks.is_main():
                told = ", ".join(f"{number:,} {how}" for how, number in counts.most_common())
                get_console().print(f"Sessions to imitate: {len(sessions):,} ({told or 'none was served'})")
            return [row for session in sessions for row in session_rows(session)]
        if self.config.sft.teacher or self.config.sft.judge or self.asks_stronger_model:
            raise AgileError(
                "sft.teacher, sft.judge and a stronger model that is not recorded are models behind an endpoint, with "
                "which sessions are built beforehand: agile sft-data CONFIG out=DIR, then agile train CONFIG "
                "sft.data=DIR."
            )
        streams = self.imitated_streams
        sizes = [len(stream.items) for stream in streams]
        own = [streams[i] for i in ranks.own_share(sizes)]
        todo = list(jobs(own, self.config.sft.sessions_per_item))
        with Progress(transient=True, disable=not ranks.is_main()) as progress:
            bar = progress.add_task("imitation", total=len(todo))
            played = self.imitation(executor).sessions(todo, on_session=lambda: progress.advance(bar))
            sessions = asyncio.run(played)
        rows: dict[str, list[Row]] = {stream.id: [] for stream in own}
        for session in sessions:
            rows[session.stream_id.rpartition("#")[0]] += session_rows(session)
        shared = ranks.gather_shares(list(rows.values()), sizes)
        return [row for rows_of_stream in shared for row in rows_of_stream]

    def figures(self, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
        """What a report says of an agent's sessions on test questions beyond right and wrong; empty for most tasks."""
        if not isinstance(self.task, HotPotQA):
            return {}
        items = {(stream.id, item.id): item for stream in self.task.streams("test") for item in stream.items}
        played = [(items[s.key], s) for t in trajectories for s in t.sessions]
        found = self.task.figures(played)
        if (judge := self.config.task.judge) is not None:
            found |= judged(judge, self.folder, played)
        return found

    @cached_property
    def _baselines(self) -> dict[str, tuple[dict[float, dict[str, BaselineRun]], float]]:
        """What each baseline does by price, and how many seconds that took."""
        found: dict[str, tuple[dict[float, dict[str, BaselineRun]], float]] = {}
        task, config = self.task, self.config
        prices = list(dict.fromkeys((config.task.advice_price, *config.evaluate.prices)))
        for name in config.evaluate.baselines:
            began = time.monotonic()
            train = task.streams("train") if name in ("never_ask", "calibrated_recall") else ()
            runs = run_baselines(
                [name], train, task.streams("test"), prices, self.encoder, task, config.seed, macro=task.macro
            )
            found[name] = runs, time.monotonic() - began
        return found

    def baselines(self, price: float | None = None) -> dict[str, BaselineRun]:
        """What baselines do at the config's price, or at another of `evaluate.prices`; all are run at once."""
        asked = self.config.task.advice_price if price is None else price
        return {name: runs[asked][name] for name, (runs, _) in self._baselines.items()}

    def baseline_seconds(self) -> dict[str, float]:
        """How long each baseline took at all prices; the first that needs the texts embeds them."""
        return {name: seconds for name, (_, seconds) in self._baselines.items()}

    def question_similarities(self) -> Callable[[str], np.ndarray]:
        """For each train stream the cosine of every pair of its questions, (n, n)."""
        streams = {s.id: s for s in self.task.streams("train")}

        def similarities(stream_id: str) -> np.ndarray:
            vectors = self.encoder.encode([item.question for item in streams[stream_id].items])
            return vectors @ vectors.T

        return similarities
