"""The page's style sheet."""

from __future__ import annotations

__all__ = ["STYLE"]

# The colours are those of Okabe and Ito, which colour-blind readers can tell apart; on a dark
# background, lighter colours of the same hue replace the darkest ones.
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1b1b;--soft:#5c5c5c;--rule:#e3e3e3;--ghost:#dcdcdc;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#b98100;--c5:#56b4e9;--c6:#555}
@media (prefers-color-scheme:dark){:root{--bg:#16181b;--fg:#e8e8e8;--soft:#a9a9a9;--rule:#33363b;
--ghost:#45484e;--c0:#4ba3e3;--c1:#f07f32;--c2:#2bbf94;--c3:#dd93bd;--c4:#e69f00;--c5:#8fd0f5;
--c6:#bbb}}
@media print{:root{--bg:#fff;--fg:#000}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:74rem;padding:1rem 1rem 3rem;background:var(--bg);color:var(--fg);
font:1rem/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.15rem;margin:2rem 0 .25rem}
p{max-width:48rem;margin:.25rem 0 .75rem}.soft,figcaption span{color:var(--soft)}
.charts{display:grid;gap:1.25rem 2rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}
figure{margin:.5rem 0;min-width:0}figcaption{font-weight:600}figcaption span{font-weight:400}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.15rem 0 .35rem;padding:0;list-style:none;
font-size:.85rem}
.legend li{display:flex;align-items:center;gap:.35rem;overflow-wrap:anywhere}
.swatch{width:26px;height:14px;flex:none}.swatch .square{fill:var(--c)}
.chart{display:block;width:100%;height:auto;font-size:12.5px;overflow:visible}
.chart text{fill:var(--fg);font-variant-numeric:tabular-nums}.chart .unit{fill:var(--soft)}
.end{text-anchor:end}.mid{text-anchor:middle}.head{font-weight:600}
.grid{stroke:var(--rule);fill:none}.axis{stroke:var(--soft);fill:none}
.line{stroke:var(--c);stroke-width:2;fill:none;stroke-linejoin:round}
.dash1{stroke-dasharray:7 4}.dash2{stroke-dasharray:2 3}.dash3{stroke-dasharray:9 3 2 3}
.dot{fill:var(--c);stroke:var(--bg);stroke-width:.8}.dot:hover{stroke:var(--fg)}
.bar{fill:var(--c)}.ghost{fill:var(--ghost)}
.s0{--c:var(--c0)}.s1{--c:var(--c1)}.s2{--c:var(--c2)}.s3{--c:var(--c3)}.s4{--c:var(--c4)}
.s5{--c:var(--c5)}.s6{--c:var(--c6)}
.table{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.3rem .6rem .3rem 0;text-align:right;border-bottom:1px solid var(--rule);
font-variant-numeric:tabular-nums;vertical-align:top;white-space:nowrap}
th{font-weight:600;vertical-align:bottom;white-space:normal}
.left{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:5.5rem}
.left:first-child{white-space:nowrap}
@media (max-width:30rem){.chart{font-size:14.5px}}
summary{cursor:pointer;margin:.5rem 0}li{overflow-wrap:anywhere}
"""
