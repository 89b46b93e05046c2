// What a run file comes to before it is started: length, buckets, rates, noise levels, memory and disk.

import { useCallback, useMemo, useRef, useState } from "react";
import { send, why } from "./api";
import { Chart } from "./chart";
import { Button, Card, cn, Dialog, Rows, useLater } from "./parts";
import type { Density, Document, PlanText, Preview } from "./types";

const WAIT = 800;

/** How long the run is, its buckets, and a caption as it is drawn. */
export function Length({ preview, problem }: { preview: Preview | null; problem: string }) {
  return (
    <Card title={<>Total training steps: {preview ? `${preview.about ? "about " : ""}${preview.total.toLocaleString("en")}` : "~"}</>}>
      <p role="status" className="text-sm break-words whitespace-pre-wrap">
        {preview ? preview.sentence : problem}
      </p>
      {preview && <p className="text-sm text-muted">{preview.besides}</p>}
      {preview?.notes.map((note) => (
        <p key={note} className="text-sm text-muted">
          {note}
        </p>
      ))}
      {preview && preview.buckets.length > 0 && (
        <details className="mt-2">
          <summary className="min-h-9 cursor-pointer text-sm font-medium">
            {preview.buckets.length} {preview.buckets.length === 1 ? "bucket" : "buckets"}, {preview.images} images
          </summary>
          <Bars rows={preview.buckets} />
          <Rows
            heads={["bucket", "images", "per epoch", "batches", "last batch", "cropped", "enlarged up to"]}
            rows={preview.buckets.map((each) => [
              `${each.width}x${each.height}`,
              each.images,
              each.presentations,
              each.batches,
              each.last_batch,
              `${(100 * each.cropped).toFixed(0)} %`,
              each.enlarged > 1 ? `${each.enlarged.toFixed(2)} times` : "not",
            ])}
          />
        </details>
      )}
      {preview && preview.captions.length > 0 && (
        <details className="mt-1">
          <summary className="min-h-9 cursor-pointer text-sm font-medium">A caption as it is trained</summary>
          <ul className="list-disc pl-5 text-sm">
            {preview.captions.map((caption, number) => (
              <li key={number}>{caption || "(empty)"}</li>
            ))}
          </ul>
        </details>
      )}
    </Card>
  );
}

/** How many presentations of an epoch each bucket has. */
function Bars({ rows }: { rows: Preview["buckets"] }) {
  const most = Math.max(...rows.map((row) => row.presentations), 1);
  return (
    <div className="mb-2 grid gap-1" role="img" aria-label={`Presentations per epoch: ${rows.map((row) => `${row.width}x${row.height} ${row.presentations}`).join(", ")}`}>
      {rows.map((row, number) => (
        <div key={number} className="grid grid-cols-[6rem_1fr_4rem] items-center gap-2 text-xs">
          <span>
            {row.width}x{row.height}
          </span>
          <svg className="h-3 w-full" viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true">
            <rect width={(100 * row.presentations) / most} height="1" className="fill-accent" />
          </svg>
          <span className="text-right">{row.presentations}</span>
        </div>
      ))}
    </div>
  );
}

export function Rates({ preview }: { preview: Preview }) {
  const lines = useMemo(
    () =>
      preview.rates.map((rate) => ({
        label: rate.label,
        metrics: { tags: ["learning rate"], curves: { "learning rate": { steps: rate.steps, values: rate.values } }, lost: {}, borders: {}, starts: [] },
      })),
    [preview],
  );
  return (
    <Card title={`Learning rate over ${preview.total.toLocaleString("en")} updates`}>
      <Chart lines={lines} tag="learning rate" logarithmic={false} share={0} />
    </Card>
  );
}

type Answer = Pick<PlanText, "code" | "text">;

async function planOf(document: Document): Promise<PlanText> {
  const { text } = await send<{ text: string }>("POST", "config/toml", { document });
  return send<PlanText>("POST", "config/plan", { text });
}

/** The answer to a slow question about the document: asked when it has rested and the last answer is here, stale until the next one. */
function useSlow<T>(ask: (document: Document) => Promise<T>, document: Document, ready: boolean): { found: T | null; stale: boolean; problem: string } {
  const [found, setFound] = useState<{ of: Document; value: T } | null>(null);
  const [problem, setProblem] = useState("");
  const [busy, setBusy] = useState(false);
  const [failed, setFailed] = useState<Document | null>(null);
  const run = () => {
    if (busy || !ready || found?.of === document || failed === document) return;
    setBusy(true);
    ask(document)
      .then((value) => {
        setFound({ of: document, value });
        setProblem("");
      })
      .catch((reason: unknown) => {
        setFound(null);
        setFailed(document);
        setProblem(why(reason));
      })
      .finally(() => setBusy(false));
  };
  useLater(run, WAIT, useMemo(() => [document, ready, busy], [document, ready, busy]));
  return { found: found?.value ?? null, stale: busy || (found?.of !== document && failed !== document), problem };
}

/** Memory and disk, and what is short, as the plan says it while settings are typed. */
export function Needs({ document, ready }: { document: Document; ready: boolean }) {
  const { found, stale, problem } = useSlow(planOf, document, ready);
  return (
    <Card title="What it needs">
      <div role="status" aria-live="polite" className={cn("grid gap-1 text-sm", stale && "opacity-70")}>
        {!ready && <p>Known once the errors are mended.</p>}
        {ready && stale && <p className="text-muted">{found ? "being computed again …" : "being computed …"}</p>}
        {problem && <p className="text-bad">{problem}</p>}
        {found?.needs.map((line, number) => {
          const [head, ...rest] = line.split(/\s+/);
          const warns = head === "warning:";
          return (
            <p key={number} className={cn("break-words", warns && "text-warn")}>
              <strong>{head}</strong> {rest.join(" ")}
            </p>
          );
        })}
        {found && !found.needs.length && <p>{found.code ? "The plan could not be made; press Plan for its reason." : "The plan has no estimate yet; press Plan to see it."}</p>}
      </div>
    </Card>
  );
}

/** How often each noise level is trained. */
export function Noise({ document, step }: { document: Document; step: number }) {
  const ask = useCallback((of: Document) => send<Density>("POST", "config/noise", { document: of, step }), [step]);
  const { found, stale, problem } = useSlow(ask, document, true);
  const shares = found?.shares ?? [];
  const most = Math.max(...shares, 1e-9);
  const peak = shares.indexOf(most);
  const level = (place: number) => (place / shares.length).toFixed(2);
  const told = shares.length ? `Most often between ${level(peak)} and ${level(peak + 1)}; ${(100 * shares.slice(0, shares.length / 2).reduce((sum, share) => sum + share, 0)).toFixed(0)} % below 0.5.` : "";
  return (
    <Card title="Noise levels that are trained">
      <p role="status" className="text-sm text-muted">
        {problem || found?.problem || (shares.length ? told : "being computed …")}
      </p>
      {shares.length > 0 && (
        <figure className={cn("mt-2", stale && "opacity-70")}>
          <svg role="img" aria-label={`Share of noise levels from 0, the picture, to 1, noise. ${told}`} viewBox={`0 0 ${shares.length} 20`} preserveAspectRatio="none" className="h-32 w-full">
            {shares.map((share, place) => (
              <rect key={place} x={place + 0.05} width={0.9} y={20 - (19 * share) / most} height={(19 * share) / most} className="fill-accent" />
            ))}
          </svg>
          <figcaption className="flex justify-between text-xs text-muted">
            <span>0, the picture</span>
            <span>0.5</span>
            <span>1, noise</span>
          </figcaption>
        </figure>
      )}
    </Card>
  );
}

/** What the run needs, as `train.py --plan` says it: memory, disk, time, caches. */
export function Plan({ document, disabled }: { document: Document; disabled: boolean }) {
  const [open, setOpen] = useState(false);
  const [found, setFound] = useState<Answer | null>(null);
  const asked = useRef(0);
  const make = async () => {
    const mine = ++asked.current;
    setOpen(true);
    setFound(null);
    const show = (answer: Answer) => mine === asked.current && setFound(answer);
    try {
      show(await planOf(document));
    } catch (problem) {
      show({ code: 1, text: why(problem) });
    }
  };
  return (
    <>
      <Button disabled={disabled} onClick={() => void make()} title="Memory, disk and time that the run needs; nothing is started">
        Plan
      </Button>
      <Dialog open={open} onOpenChange={setOpen} wide title="Plan" about="What train.py --plan says of these settings. Nothing has been started.">
        <div role="status" aria-live="polite">
          {found ? (
            <pre className={cn("max-h-[60vh] overflow-auto rounded bg-ground p-2 text-xs whitespace-pre-wrap", found.code !== 0 && "text-bad")} tabIndex={0}>
              {found.text}
            </pre>
          ) : (
            <p className="text-sm">Being made; the first one takes some seconds more …</p>
          )}
        </div>
      </Dialog>
    </>
  );
}

