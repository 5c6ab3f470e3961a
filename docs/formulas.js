// Sets the formulas of a page with KaTeX, from the files in katex/.
for (const formula of document.querySelectorAll(".arithmatex")) {
  const source = formula.textContent.replace(/^\\[([]|\\[)\]]$/g, "");
  katex.render(source, formula, { displayMode: formula.tagName === "DIV" });
}
