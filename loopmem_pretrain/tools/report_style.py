"""The frame of the report: HTML head and style sheet, light and dark, from a phone's width up. No scripts, no network.

`{{title}}` and `{{body}}` are filled in by report.py.
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}} - training report</title>
<style>
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f6f7f8; --ink: #1c1f22; --soft: #596066; --line: #d9dcdf;
  --good: #1d7a46; --bad: #b3261e; --plain: #596066;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1b1f23; --ink: #e6e8ea; --soft: #9da4ab; --line: #343a40;
    --good: #5fc48b; --bad: #f28b82; --plain: #9da4ab;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem;
  background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h1 small { display: block; font-size: .9rem; font-weight: 400; color: var(--soft); }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; overflow-wrap: anywhere; }
.verdict {
  margin: 1.25rem 0 .5rem; padding: .7rem 1rem; background: var(--card); border-left: 4px solid var(--plain);
  border-radius: 0 6px 6px 0;
}
.verdict.good { border-color: var(--good); } .verdict.good strong { color: var(--good); }
.verdict.bad { border-color: var(--bad); } .verdict.bad strong { color: var(--bad); }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem 1.2rem .28rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 400; color: var(--soft); }
td { overflow-wrap: break-word; }
details { margin: .75rem 0; } summary { cursor: pointer; color: var(--soft); }
.figures, .pair { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
.pair { align-items: start; }
figure { margin: 0; padding: .9rem 1rem; background: var(--card); border-radius: 8px; display: flex;
  flex-direction: column; justify-content: space-between; }
figcaption { font-size: .88rem; color: var(--soft); margin-bottom: .6rem; }
figcaption strong { color: var(--ink); font-weight: 600; }
svg { display: block; width: 100%; height: auto; color: var(--ink); stroke-linejoin: round; }
pre { margin: 0; padding: 1rem; background: var(--card); border-radius: 8px; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .9rem; }
</style>
</head>
<body>
<header><h1>{{title}}<small>training report</small></h1></header>
<main>
{{body}}
</main>
</body>
</html>
"""
