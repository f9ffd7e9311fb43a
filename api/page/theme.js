// Runs before the first paint, so that a chosen theme does not flash in late.
try {
  const chosen = localStorage.getItem("fathom.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // The browser keeps nothing for this page: the system's theme it is.
}
