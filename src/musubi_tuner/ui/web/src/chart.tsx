// Curves with uPlot: it follows neither its container nor the theme by itself.

import { useCallback, useEffect, useMemo, useRef, useState } from "react";
import uPlot from "uplot";
import { get } from "./api";
import { Button, inputLook, save, useFresh } from "./parts";
import type { Curve, Metrics } from "./types";

const STROKES = [
  ["#1f5fa8", "#7db3f0"],
  ["#a14a00", "#f0b45a"],
  ["#1c6b3a", "#74d19a"],
  ["#8a1c6b", "#e08fc6"],
  ["#5c5c57", "#c9c9c4"],
] as const;

export interface Line {
  label: string;
  metrics: Metrics;
}

/** Exponential running mean; a share of 0 leaves the values as they are. */
export function smoothed(values: number[], share: number): number[] {
  let last: number | undefined;
  return values.map((value) => (last = last === undefined || share === 0 ? value : share * last + (1 - share) * value));
}

/** Curves over one list of steps; null where a curve has no value. */
export function aligned(curves: Curve[]): [number[], ...(number | null)[][]] {
  const steps = [...new Set(curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, number) => [step, number]));
  const columns = curves.map((curve) => {
    const column: (number | null)[] = new Array<number | null>(steps.length).fill(null);
    curve.steps.forEach((step, number) => (column[place.get(step) ?? 0] = curve.values[number] ?? null));
    return column;
  });
  return [steps, ...columns];
}

export function Chart({ lines, tag, logarithmic, share }: { lines: Line[]; tag: string; logarithmic: boolean; share: number }) {
  const holder = useRef<HTMLDivElement>(null);
  // The part that is looked at stays when new points come.
  const zoom = useRef<{ min: number; max: number } | null>(null);
  const [theme, setTheme] = useState(document.documentElement.classList.contains("dark"));
  useEffect(() => {
    const watch = new MutationObserver(() => setTheme(document.documentElement.classList.contains("dark")));
    watch.observe(document.documentElement, { attributes: true, attributeFilter: ["class"] });
    return () => watch.disconnect();
  }, []);
  const shown = useMemo(() => lines.filter((line) => line.metrics.curves[tag]?.steps.length), [lines, tag]);
  const starts = useMemo(() => [...new Set(shown.flatMap((line) => line.metrics.starts))], [shown]);
  const lost = useMemo(() => lines.flatMap((line) => line.metrics.lost[tag] ?? []), [lines, tag]);

  useEffect(() => {
    const element = holder.current;
    if (!element || !shown.length) return;
    const curves = shown.map((line) => line.metrics.curves[tag] as Curve);
    const raw = aligned(curves);
    const soft = aligned(curves.map((curve) => ({ steps: curve.steps, values: smoothed(curve.values, share) })));
    const style = getComputedStyle(document.documentElement);
    const [ink, line] = [style.getPropertyValue("--ink"), style.getPropertyValue("--line")];
    const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line } };
    const borders = Object.entries(shown[0]?.metrics.borders ?? {});
    const colour = (number: number) => STROKES[number % STROKES.length]?.[theme ? 1 : 0] ?? ink;
    const both = share > 0;
    const options: uPlot.Options = {
      width: element.clientWidth,
      height: 320,
      scales: { x: { time: false }, y: { distr: logarithmic ? 3 : 1 } },
      axes: [
        { ...axis, label: "update", labelSize: 22 },
        { ...axis, size: 70, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : Number(tick.toPrecision(3)).toString())) },
      ],
      series: [
        { label: "update" },
        ...(both ? shown.map((each, number) => ({ label: `${each.label}, raw`, stroke: `${colour(number)}55`, width: 1, spanGaps: true })) : []),
        ...shown.map((each, number) => ({ label: each.label, stroke: colour(number), width: 2, spanGaps: true, points: { show: (raw[0].length ?? 0) < 40 } })),
      ],
      hooks: {
        draw: [
          (plot) => {
            const { ctx, bbox } = plot;
            ctx.save();
            ctx.fillStyle = style.getPropertyValue("--bad");
            for (const step of lost) {
              const x = plot.valToPos(step, "x", true);
              ctx.fillRect(x - 1, bbox.top + bbox.height - 14, 3, 14);
            }
            ctx.fillStyle = ink;
            ctx.strokeStyle = ink;
            ctx.setLineDash([4, 4]);
            ctx.textAlign = "left";
            ctx.globalAlpha = 0.45;
            for (const step of starts) {
              const x = plot.valToPos(step, "x", true);
              ctx.beginPath();
              ctx.moveTo(x, bbox.top);
              ctx.lineTo(x, bbox.top + bbox.height);
              ctx.stroke();
            }
            ctx.globalAlpha = 1;
            borders.forEach(([name, step], number) => {
              const x = plot.valToPos(step, "x", true);
              ctx.beginPath();
              ctx.moveTo(x, bbox.top);
              ctx.lineTo(x, bbox.top + bbox.height);
              ctx.stroke();
              // Short steps lie close together; their names do not.
              ctx.fillText(name, x + 4, bbox.top + 12 + 14 * (number % 3));
            });
            ctx.restore();
          },
        ],
      },
    };
    const data = (both ? [raw[0], ...raw.slice(1), ...soft.slice(1)] : raw) as uPlot.AlignedData;
    const plot = new uPlot(options, data, element);
    const zoomed = zoom.current;
    if (zoomed) plot.setScale("x", zoomed);
    const keep = () => {
      const { min, max } = plot.scales.x ?? {};
      const [first, last] = [raw[0][0], raw[0].at(-1)];
      zoom.current = min != null && max != null && (min !== first || max !== last) ? { min, max } : null;
    };
    const follow = new ResizeObserver(() => plot.setSize({ width: element.clientWidth, height: 320 }));
    follow.observe(element);
    return () => {
      keep();
      follow.disconnect();
      plot.destroy();
    };
  }, [shown, tag, logarithmic, share, theme, lost, starts]);

  const told = shown
    .map((line) => {
      const values = line.metrics.curves[tag]?.values ?? [];
      const last = values.at(-1);
      const [lowest, highest] = [values.reduce((a, b) => Math.min(a, b), Infinity), values.reduce((a, b) => Math.max(a, b), -Infinity)];
      return `${line.label}: ${values.length} points, last ${last === undefined ? "none" : last.toPrecision(4)}, lowest ${lowest.toPrecision(4)}, highest ${highest.toPrecision(4)}`;
    })
    .join("; ");
  return (
    <figure className="min-w-0">
      <div ref={holder} className="w-full overflow-hidden" role="img" aria-label={`${tag} over updates. ${told}`} />
      <figcaption className="mt-1 text-xs text-muted">
        {told || "no values yet"}
        {starts.length > 0 && <span> Resumed at {starts.slice(0, 8).join(", ")}{starts.length > 8 ? " ..." : ""}.</span>}
        {lost.length > 0 && <span className="text-bad"> Not finite at {lost.slice(0, 8).join(", ")}{lost.length > 8 ? " ..." : ""}.</span>}
      </figcaption>
    </figure>
  );
}

/** Curves of runs with the choice of tag, axis and smoothing; read again when the version changes. */
export function Curves({ of, version }: { of: { id: string; label: string }[]; version: string }) {
  const [chosen, setChosen] = useState("");
  const [logarithmic, setLogarithmic] = useState(false);
  const [share, setShare] = useState(0);
  const ids = of.map((run) => run.id).join(",");
  const ask = useCallback(
    () => Promise.all(of.map(async (run) => ({ label: run.label, metrics: await get<Metrics>(`runs/${run.id}/metrics?points=2000&tag=${encodeURIComponent(chosen)}`) }))),
    // The list is given anew with every event; its ids say whether it is another one.
    [chosen, ids],
  );
  const { value: lines, problem } = useFresh<Line[]>(ask, `${version} ${ids} ${chosen}`);
  const tags = useMemo(() => [...new Set((lines ?? []).flatMap((line) => line.metrics.tags))].sort(), [lines]);
  const shown = lines?.flatMap((line) => [...Object.keys(line.metrics.curves), ...Object.keys(line.metrics.lost)]) ?? [];
  const tag = shown.includes(chosen) || !shown.length ? chosen : (shown[0] ?? "");
  if (problem) return <p className="text-sm text-bad">{problem}</p>;
  if (!lines) return <p className="text-sm text-muted">reading …</p>;
  if (!tags.length) return <p className="text-sm text-muted">Nothing is logged yet.</p>;
  return (
    <div className="grid gap-2">
      <div className="flex flex-wrap items-end gap-3">
        <label className="text-sm">
          Curve
          <select className={inputLook} value={tag} onChange={(event) => setChosen(event.target.value)}>
            {tags.map((each) => (
              <option key={each}>{each}</option>
            ))}
          </select>
        </label>
        <label className="flex min-h-9 items-center gap-2 text-sm">
          <input type="checkbox" className="size-5" checked={logarithmic} onChange={(event) => setLogarithmic(event.target.checked)} /> Log axis
        </label>
        <label className="text-sm">
          Smoothing {share.toFixed(2)}
          <input type="range" className="block h-9" min={0} max={0.99} step={0.01} value={share} onChange={(event) => setShare(Number(event.target.value))} />
        </label>
      </div>
      <Chart lines={lines} tag={tag} logarithmic={logarithmic} share={share} />
      <div className="flex flex-wrap gap-2">
        <Button onClick={() => save(`${fileOf(tag)}.csv`, new Blob([asCsv(lines, tag)], { type: "text/csv" }))}>Save as CSV</Button>
        <Button
          onClick={(event) =>
            event.currentTarget.closest("section")?.querySelector("canvas")?.toBlob((picture) => {
              if (picture) save(`${fileOf(tag)}.png`, picture);
            })
          }
        >
          Save as PNG
        </Button>
        <span className="self-center text-xs text-muted">Drag in the chart to zoom in; double-click to see all of it.</span>
      </div>
    </div>
  );
}

const fileOf = (tag: string): string => tag.replace(/[^\w.-]+/g, "_");

/** The points that are shown, a column per run. */
export function asCsv(lines: Line[], tag: string): string {
  const shown = lines.filter((line) => line.metrics.curves[tag]);
  const [steps, ...columns] = aligned(shown.map((line) => line.metrics.curves[tag] as Curve));
  const quoted = (text: string) => `"${text.replaceAll('"', '""')}"`;
  return [["update", ...shown.map((line) => quoted(line.label))].join(), ...steps.map((step, row) => [step, ...columns.map((column) => column[row] ?? "")].join())].join("\n");
}
