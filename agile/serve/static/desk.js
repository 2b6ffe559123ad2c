// The queue: live, and by keyboard. Everything works without it but for these two.
"use strict";
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
      const answer = await fetch("/desk/queue/list", { redirect: "error" });
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
  const off = () => { live.textContent = "Not live: reload the page"; live.className = "off"; };

  const events = new EventSource("/desk/events");
  events.addEventListener("open", () => { live.textContent = "Live"; live.className = ""; load(); });
  events.addEventListener("queue", load);
  events.addEventListener("error", off);
  addEventListener("pagehide", () => events.close());
  badge();

  const press = (within, key) => within?.querySelector(`button[data-key="${key}"]`)?.click();
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input, textarea");
    const mine = event.target.closest("form.mine") ?? document.querySelector("form.mine");
    if ((event.ctrlKey || event.metaKey) && event.key === "Enter") press(mine, "answer");
    else if (event.altKey && event.code === "KeyU") press(mine, "unknown");
    else if (event.altKey && event.code === "KeyS") press(mine, "skip");
    else if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    else if (event.key === "j" || event.key === "k") {
      const all = [...document.querySelectorAll("#free > article")];
      const at = all.indexOf(document.activeElement.closest("#free > article"));
      all[Math.max(0, Math.min(all.length - 1, at + (event.key === "j" ? 1 : -1)))]?.focus();
    } else if (event.key === "c") {
      press(document.activeElement.closest("#free > article") ?? document.querySelector("#free > article"), "claim");
    } else return;
    event.preventDefault();
  });
}
