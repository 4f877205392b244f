// Tables of class "sortable": a button in every heading. Without this file a page is complete, but not sortable, and
// browsers decide whether the Tab key stops at what scrolls.
"use strict";

// What a cell is sorted by: its number, or its words. Nothing, of a cell without a value.
function keyOf(cell) {
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  const text = cell.textContent.trim();
  return text === "" || text === "–" ? null : text.toLowerCase();
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

// Cells without a value stay at the end, whatever the direction; equal ones stay as they stand.
function sortRows(table, column, direction) {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, (row) => ({ row, key: keyOf(row.cells[column]) }));
  const sign = direction === "ascending" ? 1 : -1;
  rows.sort((a, b) => {
    if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
    return sign * compare(a.key, b.key);
  });
  body.append(...rows.map(({ row }) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = Array.from(table.tHead.rows[0].cells);
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const before = heading.getAttribute("aria-sort");
      const first = heading.dataset.first ?? (heading.classList.contains("num") ? "descending" : "ascending");
      const other = { ascending: "descending", descending: "ascending" };
      const direction = before ? other[before] : first;
      for (const each of headings) each.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", direction);
      sortRows(table, column, direction);
    });
  });
}

// A box is a stop of the Tab key where there is something to scroll to.
const sizes = new ResizeObserver((entries) => {
  for (const box of new Set(entries.map(({ target }) => target.closest(".scroll")))) {
    if (box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
});
for (const box of document.querySelectorAll(".scroll")) {
  sizes.observe(box);
  if (box.firstElementChild) sizes.observe(box.firstElementChild);
}
