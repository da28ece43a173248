"""The page's style sheet: system fonts, one accent, light and dark, and a plain look on paper."""

CSS = """
:root { --bg:#fff; --fg:#1c2128; --soft:#59636e; --line:#d8dee4; --card:#f6f8fa;
  --heat:#1f6feb; --ref:#1c2128;
  --full:#8c959f; --update:#d4761c; --dispatch:#1f6feb;
  --c1:#1f6feb; --c2:#2da28f; --c3:#d4761c; --c4:#b0399a; --c5:#7d8792; --onbar:#fff; }
@media (prefers-color-scheme: dark) { :root { --bg:#0f1318; --fg:#e6eaef; --soft:#9aa5b1; --line:#2d343d;
  --card:#181d24; --heat:#58a6ff; --ref:#e6eaef; --full:#768390; --update:#e08e3c; --dispatch:#58a6ff;
  --c1:#58a6ff; --c2:#3fb8a4; --c3:#e08e3c; --c4:#d16bbf; --c5:#8b949e; --onbar:#0f1318; } }
* { box-sizing:border-box }
body { margin:0; background:var(--bg); color:var(--fg);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","DejaVu Sans",sans-serif }
main { max-width:980px; margin:0 auto; padding:40px 24px 64px }
h1 { font-size:30px; line-height:1.2; margin:0; letter-spacing:-.02em }
h2 { font-size:20px; margin:0 0 12px; letter-spacing:-.01em }
h3 { font-size:16px; margin:20px 0 10px; font-weight:600 }
h3 small, header p, footer, figcaption, dt, .legend, td small { color:var(--soft); font-weight:400 }
header p { margin:4px 0 24px } section { margin-top:48px } p { max-width:72ch }
code { font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(200px,1fr)); gap:12px }
.cards div { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px 16px }
.cards b { display:block; font-size:21px; white-space:nowrap;
  font-variant-numeric:tabular-nums; letter-spacing:-.01em }
.cards span { color:var(--soft); font-size:14px; line-height:1.35; display:block; margin-top:2px }
.pictures { display:grid; grid-template-columns:repeat(3,minmax(0,1fr)); gap:18px }
figure { margin:0 } figure img, .blank { display:block; width:100%; border-radius:6px; margin:0 0 8px }
figcaption { font-size:14px; line-height:1.45; margin-bottom:6px }
figcaption b { color:var(--fg); font-weight:600 }
.blank { aspect-ratio:1; border:1px dashed var(--line);
  display:grid; place-items:center; color:var(--soft); font-size:14px }
.masks { display:grid; grid-template-columns:repeat(auto-fill,minmax(190px,1fr)); gap:18px }
img.mask { image-rendering:pixelated; border-radius:2px }
.scroll { overflow-x:auto; margin:20px 0 }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; font-size:15px }
th { font-weight:500; color:var(--soft); font-size:13px; vertical-align:bottom }
th, td { text-align:right; padding:8px 10px; border-bottom:1px solid var(--line) }
th:first-child, td:first-child { text-align:left; padding-left:0 } td small { display:block; font-size:13px }
svg { width:100%; height:auto; display:block; margin:8px 0; font-size:13px; fill:var(--fg) }
svg .axis { fill:var(--soft); font-size:11.5px } svg .strong { font-weight:600 }
svg .inbar { fill:var(--onbar); font-size:12px } svg .grid { stroke:var(--line); stroke-width:1 }
svg .ref { stroke:var(--ref); stroke-width:2 }
.warning { border-left:3px solid var(--update); padding-left:12px }
.legend { display:flex; flex-wrap:wrap; gap:4px 20px; font-size:14px; margin:6px 0 12px; max-width:none }
.legend i { display:inline-block; width:11px; height:11px; border-radius:2px; margin-right:7px }
.facts { display:grid; grid-template-columns:repeat(auto-fit,minmax(270px,1fr)); gap:32px }
dl { display:grid; grid-template-columns:auto 1fr; gap:3px 16px; margin:0; font-size:14px }
dt { white-space:nowrap }
dd { margin:0; overflow-wrap:anywhere }
footer { margin-top:48px; border-top:1px solid var(--line); font-size:14px }
@media (max-width:600px) { main { padding:24px 16px 48px }
  .pictures { gap:8px } figcaption { font-size:12.5px } }
@media print { :root { --bg:#fff; --fg:#000; --card:#fff }
  body { font-size:11pt } main { padding:0; max-width:none }
  section { margin-top:24px; } figure, svg, tr, .cards div { break-inside:avoid }
  * { -webkit-print-color-adjust:exact; print-color-adjust:exact } }
"""
