// One token can be reached by Tab; the arrow keys walk through the others, Enter or a tap opens one.
const tokens = () => [...element.querySelectorAll(".rd-token")];
const open = (token) => {
  tokens().forEach((other) => { other.tabIndex = -1; other.removeAttribute("aria-pressed"); });
  token.tabIndex = 0;
  token.setAttribute("aria-pressed", "true");
  trigger("select", { place: Number(token.dataset.place) });
};
element.addEventListener("click", (event) => {
  const token = event.target.closest(".rd-token");
  if (token) { token.focus(); open(token); }
});
element.addEventListener("keydown", (event) => {
  const token = event.target.closest(".rd-token");
  if (!token) return;
  const all = tokens(), here = all.indexOf(token);
  const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: all.length - 1 }[event.key];
  if (to !== undefined && all[to]) { event.preventDefault(); token.tabIndex = -1; all[to].tabIndex = 0; all[to].focus(); }
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(token); }
});
