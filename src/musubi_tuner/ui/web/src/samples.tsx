// The pictures of a run: by prompt and update, two beside each other, and drawing more of them.

import { Fragment, useEffect, useMemo, useRef, useState } from "react";
import { get, send, why } from "./api";
import { Button, cn, inputLook } from "./parts";
import type { Drawing, Run, RunDetail, Sample } from "./types";

const addressOf = (run: Run, path: string, time: number): string => `/api/runs/${run.id}/picture?path=${encodeURIComponent(path)}&t=${time}`;

/** What a picture belongs to: a prompt of a step, or a folder such as plots. */
const groupOf = (sample: Sample): string => `${sample.part ? `${sample.part}: ` : ""}${sample.group}`;

export function Samples({ run, detail }: { run: Run; detail: RunDetail }) {
  const groups = useMemo(() => {
    const found = new Map<string, Sample[]>();
    for (const sample of detail.samples) found.set(groupOf(sample), [...(found.get(groupOf(sample)) ?? []), sample]);
    for (const samples of found.values()) samples.sort((a, b) => (a.step ?? a.time) - (b.step ?? b.time));
    return found;
  }, [detail.samples]);
  const [chosen, setChosen] = useState("");
  const [at, setAt] = useState<number | null>(null);
  const [beside, setBeside] = useState<number | null>(null);
  if (!groups.size) return <p className="text-sm text-muted">No pictures yet.</p>;
  const group = groups.has(chosen) ? chosen : ([...groups.keys()].find((each) => each.endsWith("all prompts")) ?? [...groups.keys()][0] ?? "");
  const samples = groups.get(group) ?? [];
  const last = samples.length - 1;
  const now = Math.min(at ?? last, last);
  const label = (number: number) => {
    const sample = samples[number];
    return sample?.step === null ? sample.name : `update ${sample?.step}`;
  };
  const figure = (number: number) => {
    const sample = samples[Math.min(number, last)];
    return (
      sample && (
        <figure className="min-w-0 flex-1">
          <figcaption className="mb-1 text-sm font-medium break-words">{label(Math.min(number, last))}</figcaption>
          <Facts run={run} sample={sample} />
          <img className="h-auto max-h-[70vh] max-w-full min-w-24 rounded border border-line" alt={`${group}, ${label(Math.min(number, last))}`} src={addressOf(run, sample.path, sample.time)} />
        </figure>
      )
    );
  };
  return (
    <div
      className="grid gap-3"
      onKeyDown={(event) => {
        const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (!step || (event.target instanceof HTMLElement && /INPUT|SELECT/.test(event.target.tagName))) return;
        event.preventDefault();
        setAt(Math.max(0, Math.min(last, now + step)));
      }}
    >
      <div className="flex flex-wrap items-end gap-4">
        <label className="min-w-0 text-sm">
          Pictures of
          <select aria-label="Pictures of" className={inputLook} value={group} onChange={(event) => setChosen(event.target.value)}>
            {[...groups.keys()].map((each) => (
              <option key={each}>{each}</option>
            ))}
          </select>
        </label>
        <label className="text-sm">
          {label(now)}
          <input type="range" aria-label="Update" className="block h-9 w-64 max-w-full" min={0} max={last} value={now} aria-valuetext={label(now)} onChange={(event) => setAt(Number(event.target.value))} />
        </label>
        <label className="flex min-h-9 items-center gap-2 text-sm">
          <input type="checkbox" className="size-5" checked={beside !== null} onChange={(event) => setBeside(event.target.checked ? 0 : null)} /> Beside another one
        </label>
        {beside !== null && (
          <label className="text-sm">
            The other one
            <select aria-label="The other one" className={inputLook} value={Math.min(beside, last)} onChange={(event) => setBeside(Number(event.target.value))}>
              {samples.map((_, number) => (
                <option key={number} value={number}>
                  {label(number)}
                </option>
              ))}
            </select>
          </label>
        )}
      </div>
      <div className={cn("flex flex-wrap gap-4", beside !== null && "md:flex-nowrap")} tabIndex={0} role="group" aria-label="Pictures; the arrow keys go to the update before and after">
        {beside !== null && figure(beside)}
        {figure(now)}
      </div>
    </div>
  );
}

/** How a picture was drawn, as its file says, and the file. */
function Facts({ run, sample }: { run: Run; sample: Sample }) {
  const [facts, setFacts] = useState<Record<string, string> | null>(null);
  return (
    <details className="mb-1 text-xs text-muted" onToggle={(event) => event.currentTarget.open && void get<{ facts: Record<string, string> }>(`runs/${run.id}/facts?path=${encodeURIComponent(sample.path)}`).then((answer) => setFacts(answer.facts)).catch(() => setFacts({}))}>
      <summary className="min-h-6 cursor-pointer">How it was drawn</summary>
      {facts && !Object.keys(facts).length && <p>Its file does not say.</p>}
      <dl className="grid grid-cols-[auto_1fr] gap-x-2">
        {Object.entries(facts ?? {}).map(([name, value]) => (
          <Fragment key={name}>
            <dt>{name}</dt>
            <dd className="wrap-anywhere">{value}</dd>
          </Fragment>
        ))}
      </dl>
      <a className="text-accent underline" href={addressOf(run, sample.path, sample.time)} download={sample.name}>
        Download
      </a>
    </details>
  );
}

/** Pictures of a run that has ended, by a prompt of one's own. */
export function Draw({ run, detail, onDone }: { run: Run; detail: RunDetail; onDone: () => void }) {
  const [prompt, setPrompt] = useState({ text: "", negative: "", width: "", height: "", seed: "", steps: "" });
  const [images, setImages] = useState(1);
  const [checkpoint, setCheckpoint] = useState("");
  const [found, setFound] = useState<Drawing | null>(null);
  const [said, setSaid] = useState("");
  const at = `runs/${run.id}/draw`;
  const done = useRef(onDone);
  done.current = onDone;
  useEffect(() => {
    void get<Drawing>(at).then(setFound).catch(() => undefined);
  }, [at]);
  useEffect(() => {
    if (found?.state !== "running") return;
    const timer = setTimeout(
      () =>
        void get<Drawing>(at)
          .then((answer) => {
            setFound(answer);
            if (answer.state !== "running") done.current();
          })
          .catch((problem: unknown) => setSaid(why(problem))),
      1000,
    );
    return () => clearTimeout(timer);
  }, [at, found]);
  // What is no number goes as it is, and the server says so.
  const number = (text: string) => (text.trim() ? (Number.isFinite(Number(text)) ? Number(text) : text) : null);
  const draw = () =>
    send<Drawing>("POST", at, {
      prompt: { text: prompt.text, negative: prompt.negative || null, width: number(prompt.width), height: number(prompt.height), seed: number(prompt.seed), steps: number(prompt.steps) },
      images,
      checkpoint,
    })
      .then((answer) => {
        setFound(answer);
        setSaid("");
      })
      .catch((problem: unknown) => setSaid(why(problem)));
  const field = (name: keyof typeof prompt, label: string, wide = false) => (
    <label className={cn("text-sm font-medium", wide ? "min-w-60 flex-1" : "w-24")}>
      {label}
      <input className={inputLook} inputMode={wide ? undefined : "numeric"} value={prompt[name]} onChange={(event) => setPrompt({ ...prompt, [name]: event.target.value })} required={name === "text"} />
    </label>
  );
  return (
    <form
      className="grid gap-3"
      onSubmit={(event) => {
        event.preventDefault();
        void draw();
      }}
    >
      <div className="flex flex-wrap items-end gap-3">
        {field("text", "Prompt", true)}
        {field("negative", "Negative prompt", true)}
      </div>
      <div className="flex flex-wrap items-end gap-3">
        {field("width", "Width")}
        {field("height", "Height")}
        {field("seed", "Seed")}
        {field("steps", "Steps")}
        <label className="w-24 text-sm font-medium">
          Pictures
          <input type="number" className={inputLook} min={1} max={64} value={images} onChange={(event) => setImages(Number(event.target.value))} />
        </label>
        <label className="text-sm font-medium">
          Checkpoint
          <select className={inputLook} value={checkpoint} onChange={(event) => setCheckpoint(event.target.value)}>
            <option value="">the newest</option>
            {detail.checkpoints.map((each) => (
              <option key={each.name}>{each.name}</option>
            ))}
          </select>
        </label>
        <Button look="main" type="submit" disabled={found?.state === "running"}>
          {found?.state === "running" ? "Being drawn …" : "Draw"}
        </Button>
      </div>
      <p role="status" aria-live="polite" className={cn("text-sm break-words whitespace-pre-wrap", (said || found?.state === "failed") && "text-bad")}>
        {said || (found?.state === "failed" ? found.message : found?.state === "finished" ? `${found.pictures.length} ${found.pictures.length === 1 ? "picture" : "pictures"} drawn, into the folder drawn of the run.` : "")}
      </p>
      {found && found.pictures.length > 0 && (
        <div className="flex flex-wrap gap-2">
          {found.pictures.map((path) => (
            <img key={path} className="h-auto max-h-80 max-w-full min-w-24 rounded border border-line" alt={path} src={addressOf(run, path, 0)} />
          ))}
        </div>
      )}
    </form>
  );
}
