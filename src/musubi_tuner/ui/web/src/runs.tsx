// All runs of this machine, and one of them: progress, curves, pictures, log, checkpoints, requests.

import { useCallback, useEffect, useMemo, useRef, useState } from "react";
import { Failure, get, send } from "./api";
import { Curves, type Line } from "./chart";
import { Badge, Button, Card, inputLook, Rows, time } from "./parts";
import type { Document, Metrics, Queued, Run, RunDetail } from "./types";

const MOST_COMPARED = 5;

export function Runs({ runs, onOpen, onCompare }: { runs: Run[]; onOpen: (id: string) => void; onCompare: (ids: string[]) => void }) {
  const [chosen, setChosen] = useState<string[]>([]);
  if (!runs.length)
    return (
      <Card title="Runs">
        <p className="text-sm text-muted">No run yet. One that is started here, or in a terminal with train.py, appears here by itself.</p>
      </Card>
    );
  return (
    <Card title="Runs">
      <div className="mb-2">
        <Button disabled={chosen.length < 2} onClick={() => onCompare(chosen)}>
          Compare {chosen.length >= 2 ? chosen.length : ""}
        </Button>
      </div>
      <ul className="grid grid-cols-1 gap-2">
        {runs.map((run) => (
          <li key={run.id} className="flex min-w-0 flex-wrap items-center gap-3 rounded-md border border-line p-2">
            <input
              type="checkbox"
              className="size-5"
              aria-label={`Compare ${run.name}`}
              checked={chosen.includes(run.id)}
              disabled={!chosen.includes(run.id) && chosen.length >= MOST_COMPARED}
              onChange={(event) => setChosen((before) => (event.target.checked ? [...before, run.id] : before.filter((id) => id !== run.id)))}
            />
            <button type="button" className="min-h-9 min-w-0 flex-1 text-left" onClick={() => onOpen(run.id)}>
              <span className="font-medium">{run.name}</span> <Badge of={run.state}>{run.state}</Badge>
              <span className="block truncate text-xs text-muted">{run.folder}</span>
            </button>
            <Progress run={run} />
          </li>
        ))}
      </ul>
    </Card>
  );
}

/** Run files that wait for their turn. */
export function QueueCard({ runs }: { runs: Run[] }) {
  const [entries, setEntries] = useState<Queued[]>([]);
  const refresh = useCallback(() => void get<Queued[]>("queue").then(setEntries).catch(() => undefined), []);
  useEffect(() => {
    refresh();
    const timer = setInterval(refresh, 1500);
    return () => clearInterval(timer);
  }, [refresh, runs.length]);
  if (!entries.length) return null;
  const change = (method: "POST" | "DELETE", path: string) => void send(method, path).then(refresh, refresh);
  return (
    <Card title="Queue">
      <ol className="grid grid-cols-1 gap-2">
        {entries.map((entry) => (
          <li key={entry.number} className="flex flex-wrap items-center gap-2 rounded-md border border-line p-2 text-sm">
            <span className="font-medium">{entry.name}</span>
            <span>{entry.state}</span>
            <span className="min-w-0 flex-1 break-words text-muted">{entry.reason}</span>
            {entry.state === "waiting" && (
              <>
                <Button look="bare" aria-label={`Move ${entry.name} up`} onClick={() => change("POST", `queue/${entry.number}/up`)}>
                  ↑
                </Button>
                <Button look="bare" aria-label={`Move ${entry.name} down`} onClick={() => change("POST", `queue/${entry.number}/down`)}>
                  ↓
                </Button>
              </>
            )}
            {entry.state !== "started" && (
              <Button look="bare" aria-label={`Remove ${entry.name} from the queue`} onClick={() => change("DELETE", `queue/${entry.number}`)}>
                Remove
              </Button>
            )}
          </li>
        ))}
      </ol>
    </Card>
  );
}

function Progress({ run }: { run: Run }) {
  const [done, total] = run.steps ? [run.step ?? 0, run.steps] : [run.done ?? 0, run.total ?? 0];
  const live = run.state === "running" || run.state === "stopping";
  return (
    <div className="w-full text-sm sm:w-72">
      <div className="flex justify-between gap-2 text-xs text-muted">
        <span className="truncate">{live ? run.phase : (run.exit?.message ?? run.phase)}</span>
        <span>{total ? `${done} / ${total}` : ""}</span>
      </div>
      {total > 0 && <progress className="h-2 w-full accent-accent" max={total} value={done} aria-label={`Progress of ${run.name}`} />}
      <div className="flex justify-between gap-2 text-xs text-muted">
        <span>{run.loss === null ? "" : `loss ${run.loss.toPrecision(4)}`}</span>
        <span>{live && run.seconds_left !== null ? `${time(run.seconds_left)} left` : ""}</span>
      </div>
    </div>
  );
}

export function RunPage({ run, onBack, onEdit, onStarted }: { run: Run; onBack: () => void; onEdit: (document: Document) => void; onStarted: (id: string | null) => void }) {
  const [detail, setDetail] = useState<RunDetail | null>(null);
  const [metrics, setMetrics] = useState<Metrics | null>(null);
  const [said, setSaid] = useState("");
  const live = run.state === "running" || run.state === "stopping";
  const at = `runs/${run.id}`;

  const refresh = useCallback(() => {
    get<RunDetail>(at).then(setDetail).catch((problem: unknown) => setSaid(String(problem)));
    get<Metrics>(`${at}/metrics?points=2000`).then(setMetrics).catch((problem: unknown) => setSaid(String(problem)));
  }, [at]);
  // What the run writes shows in its record, which comes by events.
  useEffect(refresh, [refresh, run.updated, run.state]);

  const ask = (what: string) =>
    send("POST", `${at}/${what}`)
      .then(() => setSaid(`Asked to ${what}; it answers between two updates.`))
      .catch((problem: unknown) => setSaid(problem instanceof Error ? problem.message : String(problem)));
  const resume = async () => {
    try {
      const answer = await send<{ id: string | null }>("POST", "runs", { text: detail?.toml ?? "" });
      onStarted(answer.id);
    } catch (problem) {
      setSaid(problem instanceof Failure ? problem.message : String(problem));
    }
  };
  const duplicate = () =>
    send<{ document: Document }>("POST", "config/parse", { text: detail?.toml ?? "" })
      .then((answer) => onEdit(answer.document))
      .catch((problem: unknown) => setSaid(String(problem)));

  const lines = useMemo<Line[]>(() => (metrics ? [{ label: run.name, metrics }] : []), [metrics, run.name]);
  return (
    <div className="grid grid-cols-1 gap-4">
      <div className="flex flex-wrap items-center gap-2">
        <Button look="bare" onClick={onBack}>
          ← Runs
        </Button>
        <h1 className="text-xl font-semibold">{run.name}</h1>
        <Badge of={run.state}>{run.state === "stopping" ? "stopping — saving state" : run.state}</Badge>
        <span className="min-w-0 flex-1" />
        {live ? (
          <>
            <Button onClick={() => void ask("save")}>Save now</Button>
            <Button onClick={() => void ask("sample")}>Sample now</Button>
            <Button look="bad" onClick={() => void ask("stop")} disabled={run.state === "stopping"}>
              Stop
            </Button>
          </>
        ) : (
          <Button look="main" disabled={!detail?.toml} onClick={() => void resume()}>
            {run.state === "finished" ? "Run again" : "Resume"}
          </Button>
        )}
        <Button disabled={!detail?.toml} onClick={() => void duplicate()}>
          Duplicate as config
        </Button>
      </div>
      <p role="status" aria-live="polite" className="text-sm break-words whitespace-pre-wrap">
        {said || run.exit?.message || (live ? run.message : "")}
      </p>
      <Card>
        <Progress run={run} />
        <p className="mt-2 text-xs break-all text-muted">{run.folder}</p>
        {detail && detail.steps_of_file.length > 0 && (
          <ol className="mt-2 flex flex-wrap gap-2 text-sm">
            {detail.steps_of_file.map((step) => (
              <li key={step.name} className="rounded-md border border-line px-2 py-1">
                {step.name}: {step.status}
                {step.step ? `, update ${step.step}` : ""}
              </li>
            ))}
          </ol>
        )}
      </Card>
      <Card title="Curves">{metrics ? <Curves lines={lines} /> : <p className="text-sm text-muted">reading ...</p>}</Card>
      <Card title="Samples">{detail && <Samples run={run} detail={detail} />}</Card>
      <Card title="Log">
        <Log run={run} />
      </Card>
      <Card title="Checkpoints">
        {detail?.checkpoints.length ? (
          <Rows
            heads={["step of the file", "name", "update", "epoch", "weights", "average"]}
            rows={detail.checkpoints.map((each) => [each.part, each.name, each.step, each.epoch, each.model, each.ema])}
          />
        ) : (
          <p className="text-sm text-muted">None yet.</p>
        )}
      </Card>
    </div>
  );
}

/** Pictures by update, with a slider; two of them can be put side by side. */
function Samples({ run, detail }: { run: Run; detail: RunDetail }) {
  const byStep = useMemo(() => {
    const found = new Map<string, RunDetail["samples"]>();
    for (const sample of detail.samples) {
      const step = /_step_(\d+)\.|_(\d{8})_\d+\./.exec(sample.name);
      const key = `${sample.part ? `${sample.part}, ` : ""}${step ? `update ${Number(step[1] ?? step[2])}` : "plots"}`;
      found.set(key, [...(found.get(key) ?? []), sample]);
    }
    return [...found];
  }, [detail.samples]);
  const [at, setAt] = useState<number | null>(null);
  const [beside, setBeside] = useState<number | null>(null);
  if (!byStep.length) return <p className="text-sm text-muted">No pictures yet.</p>;
  const last = byStep.length - 1;
  const now = Math.min(at ?? last, last);
  const column = (number: number) => {
    const [label, samples] = byStep[Math.min(number, last)] ?? ["", []];
    return (
      <figure className="min-w-0">
        <figcaption className="mb-1 text-sm font-medium">{label}</figcaption>
        <div className="flex flex-wrap items-start gap-2">
          {samples.map((sample) => (
            <img key={sample.path} className="h-auto max-w-full min-w-24 rounded border border-line" loading="lazy" alt={`${sample.name} of ${label}`} src={`/api/runs/${run.id}/picture?path=${encodeURIComponent(sample.path)}&t=${sample.time}`} />
          ))}
        </div>
      </figure>
    );
  };
  return (
    <div className="grid gap-3">
      <div className="flex flex-wrap items-end gap-4">
        <label className="text-sm">
          Update
          <input type="range" className="block h-9 w-64 max-w-full" min={0} max={last} value={now} aria-valuetext={byStep[now]?.[0]} onChange={(event) => setAt(Number(event.target.value))} />
        </label>
        <label className="flex min-h-9 items-center gap-2 text-sm">
          <input type="checkbox" className="size-5" checked={beside !== null} onChange={(event) => setBeside(event.target.checked ? 0 : null)} /> Beside another one
        </label>
        {beside !== null && (
          <label className="text-sm">
            The other one
            <select className={inputLook} value={beside} onChange={(event) => setBeside(Number(event.target.value))}>
              {byStep.map(([label], number) => (
                <option key={label} value={number}>
                  {label}
                </option>
              ))}
            </select>
          </label>
        )}
      </div>
      <div className={beside === null ? "" : "grid gap-4 md:grid-cols-2"}>
        {beside !== null && column(beside)}
        {column(now)}
      </div>
    </div>
  );
}

function Log({ run }: { run: Run }) {
  const [text, setText] = useState("");
  const [follow, setFollow] = useState(true);
  const [words, setWords] = useState("");
  const offset = useRef<number | null>(null);
  const box = useRef<HTMLPreElement>(null);
  useEffect(() => {
    offset.current = null;
    setText("");
  }, [run.id]);
  useEffect(() => {
    let ended = false;
    const from = offset.current ?? -65_536;
    get<{ text: string; offset: number; size: number }>(`runs/${run.id}/log?offset=${from}`)
      .then((answer) => {
        if (ended) return;
        // A log that is shorter than what was read has begun anew.
        if (offset.current !== null && answer.size < offset.current) offset.current = null;
        else {
          setText((before) => (offset.current === null ? answer.text : (before + answer.text).slice(-200_000)));
          offset.current = answer.offset;
        }
      })
      .catch(() => undefined);
    return () => {
      ended = true;
    };
  }, [run.id, run.updated, run.state]);
  const lines = useMemo(() => text.split("\n").slice(-2000), [text]);
  const shown = words ? lines.filter((line) => line.toLowerCase().includes(words.toLowerCase())) : lines;
  useEffect(() => {
    if (follow && box.current) box.current.scrollTop = box.current.scrollHeight;
  }, [follow, shown]);
  return (
    <div className="grid gap-2">
      <div className="flex flex-wrap items-end gap-3">
        <label className="text-sm">
          Lines with
          <input className={inputLook} value={words} onChange={(event) => setWords(event.target.value)} />
        </label>
        <label className="flex min-h-9 items-center gap-2 text-sm">
          <input type="checkbox" className="size-5" checked={follow} onChange={(event) => setFollow(event.target.checked)} /> Follow
        </label>
      </div>
      <pre
        ref={box}
        tabIndex={0}
        aria-label="Log"
        className="h-72 overflow-auto rounded-md border border-line bg-ground p-2 text-xs"
        onScroll={(event) => {
          const { scrollHeight, scrollTop, clientHeight } = event.currentTarget;
          if (scrollHeight - scrollTop - clientHeight > 40) setFollow(false);
        }}
      >
        {shown.join("\n")}
      </pre>
    </div>
  );
}

export function Compare({ runs, onBack }: { runs: Run[]; onBack: () => void }) {
  const [lines, setLines] = useState<Line[]>([]);
  const ids = runs.map((run) => run.id).join(",");
  useEffect(() => {
    Promise.all(runs.map(async (run) => ({ label: run.name, metrics: await get<Metrics>(`runs/${run.id}/metrics?points=2000`) })))
      .then(setLines)
      .catch(() => setLines([]));
    // The runs are given anew with every event; their ids say whether they are others.
  }, [ids]);
  return (
    <div className="grid gap-4">
      <div>
        <Button look="bare" onClick={onBack}>
          ← Runs
        </Button>
      </div>
      <Card title={`${runs.length} runs`}>
        <Curves lines={lines} />
      </Card>
    </div>
  );
}
