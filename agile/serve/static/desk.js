// The desk by keyboard, and the queue live. Everything works without it but for these two.
"use strict";
const press = (within, key) => within?.querySelector(`button[data-key="${key}"]`)?.click();
const current = (cards) => document.activeElement.closest(cards) ?? document.querySelector(cards);
const move = (cards, by) => {
  const all = [...document.querySelectorAll(cards)];
  const at = all.indexOf(document.activeElement.closest(cards));
  all[Math.max(0, Math.min(all.length - 1, at + by))]?.focus();
};
const typing = (event) => event.target.matches("input, textarea") || event.ctrlKey || event.metaKey || event.altKey;
const sends = (event) => (event.ctrlKey || event.metaKey) && event.key === "Enter";

if (document.body.dataset.page === "queue") {
  const title = document.title;
  const live = document.getElementById("live");
  const find = (id) => document.getElementById(id);

  const badge = () => {
    const number = Number(find("free").dataset.number);
    document.title = number ? `(${number}) ${title}` : title;
  };

  let loading = false;
  let again = false;
  const load = async () => {
    if (loading) { again = true; return; }
    loading = true;
    try {
      const answer = await fetch("/desk/queue/list", { redirect: "manual" });
      if (answer.type === "opaqueredirect") { out = true; off(); }  // to the login
      if (!answer.ok) throw new Error(String(answer.status));
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      // what somebody is typing stays as long as the question is theirs
      if (page.getElementById("mine").dataset.ids !== find("mine").dataset.ids) find("mine").replaceWith(page.getElementById("mine"));
      const focused = [...document.querySelectorAll("#free > article")].indexOf(document.activeElement.closest("#free > article"));
      find("free").replaceWith(page.getElementById("free"));
      if (focused >= 0) document.querySelectorAll("#free > article")[focused]?.focus();
      badge();
    } catch {
      off();
    }
    loading = false;
    if (again) { again = false; load(); }
  };
  let out = false;
  const off = () => {
    live.textContent = out ? "You are logged out: load the page again" : "Not live, trying again";
    live.className = "off";
  };

  // a browser tries again by itself where nobody listens, but not after an answer of a proxy that says so
  const listen = () => {
    const events = new EventSource("/desk/events");
    events.addEventListener("open", () => { live.textContent = "Live"; live.className = ""; load(); });
    events.addEventListener("queue", load);
    events.addEventListener("error", () => {
      off();
      if (events.readyState === EventSource.CLOSED && !out) { load(); setTimeout(listen, 3000); }
    });
    addEventListener("pagehide", () => events.close());
  };
  listen();
  badge();

  const cards = "#free > article";
  document.addEventListener("keydown", (event) => {
    const mine = event.target.closest("form.mine") ?? document.querySelector("form.mine");
    if (sends(event)) press(mine, "answer");
    else if (event.altKey && event.code === "KeyU") press(mine, "unknown");
    else if (event.altKey && event.code === "KeyS") press(mine, "skip");
    else if (typing(event)) return;
    else if (event.key === "j" || event.key === "k") move(cards, event.key === "j" ? 1 : -1);
    else if (event.key === "c") press(current(cards), "claim");
    else return;
    event.preventDefault();
  });
}

if (document.body.dataset.page === "review") {
  const cards = "#cards > form";
  document.querySelector(cards)?.focus();
  document.addEventListener("keydown", (event) => {
    if (sends(event)) press(current(cards), "send");
    else if (typing(event)) return;
    else if (event.key === "j" || event.key === "k") move(cards, event.key === "j" ? 1 : -1);
    else if (event.key === "r") press(current(cards), "right");
    else if (event.key === "w") press(current(cards), "wrong");
    else if (event.key === "c") current(cards)?.querySelector("input[name=answer]").focus();
    else return;
    event.preventDefault();
  });
}
