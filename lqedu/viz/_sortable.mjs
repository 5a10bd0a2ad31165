// Makes the columns of a table sortable. Without it the table is complete, in the order in which it was written.

/** What a cell sorts by: [0, number], then [1, text], then a dash, which has no value. */
const keyOf = (text) => {
  const number = Number(text.replace(/[−–]/g, "-").replace(/[,+%]/g, ""));
  return text === "" || text === "–" ? [2, 0] : Number.isNaN(number) ? [1, text.toLowerCase()] : [0, number];
};

/** Negative, zero or positive, as sort expects it; cells without a value come last in both directions. */
const compare = (a, b, sign) => {
  if (a[0] !== b[0]) return a[0] === 2 || b[0] === 2 ? a[0] - b[0] : sign * (a[0] - b[0]);
  return a[1] < b[1] ? -sign : a[1] > b[1] ? sign : 0;
};

for (const region of document.querySelectorAll(".lqedu-sortable:not([data-ready])")) {
  region.dataset.ready = "";
  const body = region.querySelector("tbody"), heads = [...region.querySelectorAll("thead th")];
  const said = region.parentElement.querySelector(".lqedu-sorted");
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [keyOf(row.cells[column].textContent.trim()), row]);
      body.append(...rows.sort(([a], [b]) => compare(a, b, sign)).map(([, row]) => row));
      said.textContent = `Sorted by ${button.textContent.trim()}, ${sign > 0 ? "ascending" : "descending"}.`;
    });
  });
  said.textContent = "A column's head sorts by it; a second time turns the order round.";
}
