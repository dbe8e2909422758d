// A line above each long table: only rows with all of its words are shown.
document$.subscribe(() => {
  for (const table of document.querySelectorAll(".md-typeset table:not([class])")) {
    const rows = [...table.tBodies[0].rows]
    if (rows.length < 8) continue
    const input = Object.assign(document.createElement("input"), { type: "search", placeholder: "Filter", className: "filter" })
    const count = Object.assign(document.createElement("span"), { className: "filter-count" })
    const show = () => {
      const words = input.value.toLowerCase().split(/\s+/)
      for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word))
      count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`
    }
    input.setAttribute("aria-label", "Filter the rows of the table")
    input.addEventListener("input", show)
    ;(table.closest(".md-typeset__scrollwrap") ?? table).before(input, count) // above what scrolls sideways
    show()
  }
})
