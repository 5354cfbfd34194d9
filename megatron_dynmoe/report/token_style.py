"""The looks of the page of token costs: one style sheet for light and dark, with no address in it."""

SHADES = 16

# One hue at rising opacity over the background, so that one list serves both schemes. At the darkest shade the text
# keeps a contrast above 4.5 to 1 in both.
_OPACITY = [0.03 + 0.77 * step / (SHADES - 1) for step in range(SHADES)]

STYLE = (
    """\
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #16181d; --faint: #5b6270; --line: #d4d8df; --heat: 226 104 0;
  --ffn: #e26800; --constant: #2f7fc1; --copy: #4c9a52; --zero: #8a8f99;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --ink: #eceef2; --faint: #a0a7b4; --line: #363b45; --heat: 190 82 0;
    --ffn: #d06a10; --constant: #4a97d8; --copy: #5cab62; --zero: #777d88;
  }
}
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif;
}
h1 { margin: 0; font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 0.5rem; font-size: 1.15rem; }
p { margin: 0.3rem 0; }
.note { color: var(--faint); font-size: 0.9rem; }
dl { display: flex; flex-wrap: wrap; gap: 0.5rem 2.5rem; margin: 1rem 0; }
dt { color: var(--faint); font-size: 0.85rem; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.legend { display: inline-block; margin: 0.5rem 0; font-size: 0.85rem; }
.scale { display: flex; border: 1px solid var(--line); }
.scale span { width: 1.4rem; height: 0.9rem; }
.ends { display: flex; justify-content: space-between; gap: 1rem; font-variant-numeric: tabular-nums; }
.text {
  padding: 1rem; border: 1px solid var(--line); border-radius: 4px; font: 15px/1.9 ui-monospace, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 8;
}
.text span[title] { padding: 0.15em 0; box-shadow: inset -1px 0 var(--line); }
.text span[title]:hover { outline: 2px solid var(--ink); }
.mark { opacity: 0.6; font-size: 0.8em; user-select: none; }
.part { font-size: 0.8em; font-style: italic; }
.gap { color: var(--faint); }
.side { display: flex; flex-wrap: wrap; gap: 1rem 3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); font-size: 0.9rem; padding-bottom: 0.3rem; }
th { font-weight: normal; color: var(--faint); font-size: 0.85rem; text-align: right; }
th, td { padding: 0.1rem 0.8rem 0.1rem 0; }
td { text-align: right; }
th.first, td.first { text-align: left; }
td code { padding: 0.1rem 0.3rem; font: 14px ui-monospace, monospace; overflow-wrap: anywhere; }
.wide { width: 100%; }
.wide td.bar { width: 70%; }
.track { display: flex; height: 0.9rem; background: rgb(128 128 128 / 0.15); }
.key { display: inline-block; width: 0.8rem; height: 0.8rem; margin: 0 0.3rem 0 1rem; }
.ffn { background: var(--ffn); }
.constant { background: var(--constant); }
.copy { background: var(--copy); }
.zero { background: var(--zero); }
"""
    + "\n".join(f".h{step} {{ background: rgb(var(--heat) / {value:.2f}); }}" for step, value in enumerate(_OPACITY))
    + "\n"
)
