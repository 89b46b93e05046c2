// All runs of this machine, and one of them: progress, curves, pictures, log, checkpoints, requests.

import { useCallback, useEffect, useMemo, useRef, useState } from "react";
import { get, send, why } from "./api";
import { Curves } from "./chart";
import { Badge, Button, Card, inputLook, Rows, time, useFresh } from "./parts";
import { Draw, Samples } from "./samples";
import type { Document, Queue, Run, RunDetail, Started } from "./types";

const SERIOUS = /warning|error|failed|traceback/i;
const MOST_COMPARED = 5;
/** Milliseconds after which a run that was asked to stop can be ended. */
const STOPS_WITHIN = 30_000;

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
  const [{ paused, entries }, setQueue] = useState<Queue>({ paused: false, entries: [] });
  const refresh = useCallback(() => void get<Queue>("queue").then(setQueue).catch(() => undefined), []);
  useEffect(() => {
    refresh();
    const timer = setInterval(refresh, 1500);
    return () => clearInterval(timer);
  }, [refresh, runs.length]);
  if (!entries.length) return null;
  const change = (method: "POST" | "DELETE", path: string) => void send(method, path).then(refresh, refresh);
  return (
    <Card title="Queue">
      <div className="mb-2 flex flex-wrap items-center gap-2 text-sm">
        <Button aria-pressed={paused} onClick={() => void send<Queue>("PUT", "queue", { paused: !paused }).then(setQueue).catch(() => undefined)}>
          {paused ? "Go on" : "Pause after the current run"}
        </Button>
        {paused && <span role="status">Paused: nothing is started until you go on.</span>}
      </div>
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

export function RunPage({ run, onBack, onEdit, onStarted }: { run: Run; onBack: () => void; onEdit: (document: Document) => void; onStarted: (run: Started) => void }) {
  const [said, setSaid] = useState("");
  const live = run.state === "running" || run.state === "stopping";
  const at = `runs/${run.id}`;
  const [late, setLate] = useState(false);
  useEffect(() => {
    setLate(false);
    if (run.state !== "stopping") return;
    const timer = setTimeout(() => setLate(true), STOPS_WITHIN);
    return () => clearTimeout(timer);
  }, [run.state]);

  // What the run writes shows in its record, which comes by events.
  const [looks, setLooks] = useState(0);
  const version = `${run.updated} ${run.state} ${looks}`;
  const { value: detail, problem } = useFresh<RunDetail>(useCallback(() => get<RunDetail>(at), [at]), version);
  const refresh = () => setLooks((before) => before + 1);

  const ask = (what: string) =>
    send("POST", `${at}/${what}`)
      .then(() => setSaid(what === "end" ? "It was told to end." : `Asked to ${what}; it answers between two updates.`))
      .catch((problem: unknown) => setSaid(why(problem)));
  const resume = async () => {
    try {
      const answer = await send<Started>("POST", `${at}/resume`);
      onStarted(answer);
    } catch (problem) {
      setSaid(why(problem));
    }
  };
  const duplicate = () =>
    send<{ document: Document }>("POST", "config/parse", { text: detail?.toml ?? "" })
      .then((answer) => onEdit(answer.document))
      .catch((problem: unknown) => setSaid(why(problem)));

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
            {run.state === "stopping" && late ? (
              <Button look="bad" onClick={() => confirm("End the run now? What it has not saved is lost; its last state stays.") && void ask("end")}>
                End now, without saving
              </Button>
            ) : (
              <Button look="bad" onClick={() => void ask("stop")} disabled={run.state === "stopping"}>
                Stop
              </Button>
            )}
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
        {said || problem || run.exit?.message || (live ? run.message : "")}
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
      <Card title="Curves">
        <Curves of={[{ id: run.id, label: run.name }]} version={version} />
        <p className="mt-2 text-xs text-muted">
          Also in TensorBoard: <code className="wrap-anywhere">tensorboard --logdir {run.folder}/logs</code>
        </p>
      </Card>
      <Card title="Samples">{detail && <Samples run={run} detail={detail} />}</Card>
      {detail?.draws && !live && (
        <Card title="Draw">
          <Draw run={run} detail={detail} onDone={refresh} />
        </Card>
      )}
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
  const [serious, setSerious] = useState(false);
  const shown = lines.filter((line) => (!serious || SERIOUS.test(line)) && (!words || line.toLowerCase().includes(words.toLowerCase())));
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
          <input type="checkbox" className="size-5" checked={serious} onChange={(event) => setSerious(event.target.checked)} /> Warnings and errors only
        </label>
        <label className="flex min-h-9 items-center gap-2 text-sm">
          <input type="checkbox" className="size-5" checked={follow} onChange={(event) => setFollow(event.target.checked)} /> Follow
        </label>
        <a className="flex min-h-9 items-center text-sm text-accent underline" href={`/api/runs/${run.id}/log/file`} download>
          Download the whole log
        </a>
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
  return (
    <div className="grid gap-4">
      <div>
        <Button look="bare" onClick={onBack}>
          ← Runs
        </Button>
      </div>
      <Card title={`${runs.length} runs`}>
        <Curves of={runs.map((run) => ({ id: run.id, label: labelOf(run, runs) }))} version={runs.map((run) => `${run.updated} ${run.state}`).join()} />
      </Card>
    </div>
  );
}

/** The name of a run; with its folder where several have the same. */
function labelOf(run: Run, runs: Run[]): string {
  return runs.filter((each) => each.name === run.name).length > 1 ? `${run.name} (${run.folder.split("/").slice(-2).join("/")})` : run.name;
}
