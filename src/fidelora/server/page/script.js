// Script of the page. Gradio has no settings for these behaviours.

// Files that are dropped outside of a drop zone go to the drop zone of the visible tab.
const dropZones = ["drop", "run-zip"];
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  if (!carriesFiles(event) || event.defaultPrevented) return;
  event.preventDefault(); // the browser would open the file
  const inputs = dropZones.map((id) => document.querySelector(`#${id} input[type=file]`));
  const input = inputs.find((one) => one?.parentElement.offsetParent);
  if (!input) return;
  input.files = event.dataTransfer.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
});

// Ctrl+Enter clicks the main button of the visible tab.
document.addEventListener(
  "keydown",
  (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    if (event.repeat) return;
    const ids = ["generate", "verify", "compare"];
    if (event.target.closest?.("#differs")) ids.unshift("explain");
    const buttons = ids.map((id) => document.getElementById(id));
    const button = buttons.find((one) => one?.offsetParent);
    if (!button) return;
    event.preventDefault();
    event.stopPropagation();
    button.click();
  },
  true,
);

// The second click of a double click sends no second request.
document.addEventListener(
  "click",
  (event) => {
    if (event.detail > 1 && event.target.closest("#generate")) event.stopImmediatePropagation();
  },
  true,
);

// A button in the list of requests writes the number of its request to a hidden input.
document.addEventListener("click", (event) => {
  const button = event.target.closest("ul.queue button");
  const box = document.querySelector("#cancel-one input");
  if (!button || !box) return;
  button.disabled = true;
  box.value = button.value;
  box.dispatchEvent(new Event("input", { bubbles: true }));
});

// A list that allows several choices closes after each choice, and a click opens it again.
const listOf = (target) =>
  target.closest?.("#loras, #checkpoints")?.querySelector("input[aria-controls]");
document.addEventListener("mousedown", (event) => {
  const input = listOf(event.target);
  if (!input) return;
  if (event.target.closest("[role=option]")) setTimeout(() => input.blur());
  else if (event.target === input && document.activeElement === input)
    input.dispatchEvent(new FocusEvent("focus"));
});
document.addEventListener("keydown", (event) => {
  const input = listOf(event.target);
  if (event.key !== "Enter" || event.target !== input) return;
  const escape = new KeyboardEvent("keydown", { key: "Escape", bubbles: true });
  setTimeout(() => input.dispatchEvent(escape));
});

// A list closes when Tab leaves it; Gradio keeps it open if the window does not have the focus.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Tab" || !event.target.matches?.("input[aria-expanded=true]")) return;
  event.target.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
});

// A linked report is shown in a sandboxed frame above the link. Messages scroll into view.
const showReport = (link) => {
  link.dataset.shown = "";
  const frame = document.createElement("iframe");
  frame.className = "report";
  frame.title = "Report";
  frame.setAttribute("sandbox", "allow-scripts");
  frame.src = link.href;
  link.before(frame);
};
new MutationObserver((changes) => {
  for (const link of document.querySelectorAll("a.report:not([data-shown])")) showReport(link);
  // Chromium lets Tab stop at a list that scrolls; the list closes, and the focus is lost.
  for (const list of document.querySelectorAll("ul[role=listbox]:not([tabindex])"))
    list.tabIndex = -1;
  // Only for a new message: a later scroll would move a button away from under the mouse.
  for (const node of changes.flatMap((change) => [...change.addedNodes]))
    if (node.matches?.("#loaded .message, #error .message"))
      node.scrollIntoView({ block: "nearest" });
}).observe(document, { childList: true, subtree: true });

// After a click on a button, the page scrolls to its progress if that is not visible.
const progressOf = { generate: "progress", verify: "verdict", explain: "verdict", compare: "progress-compare" };
document.addEventListener("click", (event) => {
  const id = progressOf[event.target.closest("button")?.id] ?? "";
  const progress = document.getElementById(id);
  if (progress && progress.getBoundingClientRect().top > innerHeight - 200)
    progress.scrollIntoView({ block: "center" });
});
