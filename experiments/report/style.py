"""The page's style sheet."""

STYLE = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #ffffff; --ink: #1c2024; --soft: #5b646d;
  --line: #dcdfe3; --accent: #0b62a8; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181b; --card: #1d2125; --ink: #e6e8eb;
  --soft: #a3acb5; --line: #343a41; --accent: #7cbcf0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 2.5rem) 4rem; }
h1 { font-size: clamp(1.6rem, 4vw, 2.2rem); line-height: 1.2; margin: 0; letter-spacing: -0.015em; }
h2 { font-size: 1.25rem; margin: 0 0 .6rem; }
h3 { font-size: .95rem; margin: 0 0 .5rem; }
header p { margin: .35rem 0 0; color: var(--soft); overflow-wrap: anywhere; }
section { margin-top: 3rem; }
section > p { max-width: 46rem; margin: 0 0 1rem; }
.note { color: var(--soft); font-size: .875rem; max-width: 52rem; margin: .8rem 0 0; }
ul.note { padding-left: 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); margin: 2rem 0 0;
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
.tiles div { box-shadow: 1px 1px 0 var(--line); padding: 1rem 1.1rem; display: flex; flex-direction: column; }
.tiles dd { margin: 0; font-size: 1.9rem; line-height: 1.15; font-weight: 600; font-variant-numeric:
tabular-nums; } .tiles dt { color: var(--soft); font-size: .875rem; line-height: 1.35; margin-top: .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: 0; font-weight: 400; }
thead th { color: var(--soft); font-size: .85rem; font-weight: 600; }
thead th:first-child { font-weight: 600; }
tr.main th, tr.main td { font-weight: 600; }
tr.kept th, tr.kept td { color: var(--accent); }
tr.aside th, tr.aside td { color: var(--soft); }
figure { margin: 0 0 1.75rem; }
figcaption { font-size: .9rem; color: var(--soft); overflow-wrap: anywhere; }
.triple { display: grid; grid-template-columns: repeat(3, 1fr); gap: .6rem; }
.triple img { display: block; width: 100%; height: auto; border-radius: 4px; background: var(--line); }
.triple span { display: block; font-size: .8rem; color: var(--soft); margin-top: .2rem; }
.example figcaption { color: var(--ink); margin-top: .25rem; }
@media (max-width: 34rem) { .triple { grid-template-columns: 1fr; } }
.chart { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem; }
.chart img { display: block; width: 100%; min-width: 38rem; height: auto; margin-top: .5rem; }
.chart code { color: var(--ink); font-size: .95em; margin-right: .4rem; }
.settings { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1.5rem 2.5rem; }
.pairs { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.1rem; margin: 0; font-size:
.9rem; } .pairs dt { color: var(--soft); }
.pairs dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
@media print { body { background: none; } .example, .chart { break-inside: avoid; } }
"""
