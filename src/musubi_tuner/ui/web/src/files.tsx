// Run files: loaded, saved, imported, seen as TOML, compared.

import { useEffect, useRef, useState } from "react";
import { get, send, why } from "./api";
import { Button, Card, cn, Dialog, inputLook, Rows, save } from "./parts";
import { shown } from "./document";
import type { Difference, Document, Run, RunDetail } from "./types";

export function SaveAs({ name, onSave }: { name: string; onSave: (as: string) => Promise<void> }) {
  const [open, setOpen] = useState(false);
  const [text, setText] = useState(name);
  return (
    <>
      <Button
        onClick={() => {
          setText(name);
          setOpen(true);
        }}
      >
        Save config
      </Button>
      <Dialog open={open} onOpenChange={setOpen} title="Save config" about="Letters, digits, points, dashes and underscores. It goes to data/configs.">
        <form
          className="flex gap-2"
          onSubmit={(event) => {
            event.preventDefault();
            setOpen(false);
            void onSave(text);
          }}
        >
          <label htmlFor="config-name" className="sr-only">
            Name
          </label>
          <input id="config-name" className={inputLook} value={text} onChange={(event) => setText(event.target.value)} required pattern="[A-Za-z0-9_][A-Za-z0-9._\-]{0,79}" />
          <Button look="main" type="submit">
            Save
          </Button>
        </form>
      </Dialog>
    </>
  );
}

export function Files({ empty, onLoad, onGone, onSaid }: { empty: Document; onLoad: (document: Document, name: string, tag: string | null) => boolean; onGone: (name: string) => void; onSaid: (text: string) => void }) {
  const [names, setNames] = useState<{ saved: string[]; templates: string[] }>({ saved: [], templates: [] });
  const refresh = () => void get<typeof names>("configs").then(setNames).catch(() => undefined);
  useEffect(refresh, []);
  const file = useRef<HTMLInputElement>(null);
  const [choice, setChoice] = useState("");
  const [report, setReport] = useState<Record<string, unknown[]> | null>(null);
  const take = (chosen: File) =>
    void chosen
      .text()
      .then((text) => send<{ document: Document; report: Record<string, unknown[]> }>("POST", "config/import", { text, name: chosen.name }))
      .then((answer) => {
        if (!onLoad(answer.document, "", null)) return;
        setReport(answer.report);
        onSaid(`Imported ${chosen.name}.`);
      })
      .catch((problem: unknown) => onSaid(why(problem)));
  const latest = useRef(take);
  latest.current = take;
  // A file that is dropped anywhere on the page is imported, instead of shown by the browser.
  useEffect(() => {
    const holdsFiles = (event: DragEvent) => event.dataTransfer?.types.includes("Files") ?? false;
    const over = (event: DragEvent) => {
      if (holdsFiles(event)) event.preventDefault();
    };
    const drop = (event: DragEvent) => {
      if (!holdsFiles(event)) return;
      event.preventDefault();
      const chosen = event.dataTransfer?.files[0];
      if (chosen) latest.current(chosen);
    };
    window.addEventListener("dragover", over);
    window.addEventListener("drop", drop);
    return () => {
      window.removeEventListener("dragover", over);
      window.removeEventListener("drop", drop);
    };
  }, []);
  const remove = () => {
    const chosen = choice.slice(2);
    if (!confirm(`Delete the saved config ${chosen}?`)) return Promise.resolve();
    return send("DELETE", `configs/${encodeURIComponent(chosen)}`)
      .then(() => {
        onSaid(`Deleted ${chosen}.`);
        onGone(chosen);
        setChoice("");
        refresh();
      })
      .catch((problem: unknown) => onSaid(why(problem)));
  };
  const load = () => {
    const [kind, chosen] = [choice.slice(0, 1), choice.slice(2)];
    return get<{ document: Document; tag: string }>(`configs/${encodeURIComponent(chosen)}?template=${kind === "t"}`)
      .then((answer) => {
        if (onLoad(answer.document, kind === "s" ? chosen : "", kind === "s" ? answer.tag : null)) onSaid(`Loaded ${chosen}.`);
      })
      .catch((problem: unknown) => onSaid(why(problem)));
  };
  return (
    <div className="flex min-w-0 flex-wrap items-end gap-2">
      <div className="min-w-0">
        <label htmlFor="load" className="text-sm font-medium">
          Load config
        </label>
        <select
          id="load"
          className={inputLook}
          value={choice}
          onFocus={refresh}
          onChange={(event) => setChoice(event.target.value)}
        >
          <option value="" disabled>
            choose ...
          </option>
          <optgroup label="Saved">
            {names.saved.map((each) => (
              <option key={each} value={`s:${each}`}>
                {each}
              </option>
            ))}
          </optgroup>
          <optgroup label="Templates">
            {names.templates.map((each) => (
              <option key={each} value={`t:${each}`}>
                {each}
              </option>
            ))}
          </optgroup>
        </select>
      </div>
      <Button disabled={!choice} onClick={() => void load()}>
        Load
      </Button>
      <Button onClick={() => onLoad(empty, "", null)}>New</Button>
      {choice.startsWith("s:") && (
        <Button onClick={() => void remove()}>Delete</Button>
      )}
      <Button onClick={() => file.current?.click()}>Import …</Button>
      <Dialog open={report !== null} onOpenChange={() => setReport(null)} wide title="What became of it" about="Every key of the imported file. The form has what was taken over; save it to keep it.">
        {report && <Report report={report} />}
      </Dialog>
      <input
        ref={file}
        type="file"
        className="hidden"
        aria-label="File to import"
        accept=".toml,.json,.yaml,.yml,.sh,.txt"
        onChange={(event) => {
          const chosen = event.target.files?.[0];
          event.target.value = "";
          if (chosen) take(chosen);
        }}
      />
    </div>
  );
}
/** Lists of an import, those first on which something depends. */
const GROUPS: [string, string][] = [
  ["refused", "Not supported"],
  ["unknown", "Unknown"],
  ["needs_you", "Needs you"],
  ["dropped_changes_result", "Left out, which changes the result"],
  ["secrets_removed", "Secrets, which are not imported"],
  ["converted", "Converted"],
  ["defaulted", "Defaults of the other program that differ from ours"],
  ["carried", "Taken over"],
  ["dropped_harmless", "Not needed"],
];

function Report({ report }: { report: Record<string, unknown[]> }) {
  return (
    <div className="grid gap-3">
      {GROUPS.filter(([key]) => report[key]?.length).map(([key, title]) => (
        <section key={key}>
          <h3 className="text-sm font-semibold">
            {title} ({report[key]?.length})
          </h3>
          <ul className="text-sm">
            {report[key]?.map((entry, number) => (
              <li key={number} className="wrap-anywhere">
                {told(key, Array.isArray(entry) ? entry : [entry])}
              </li>
            ))}
          </ul>
        </section>
      ))}
    </div>
  );
}

/** An entry of a list in words. */
function told(key: string, entry: unknown[]): string {
  const [source, ...rest] = entry.map(shown);
  if (key === "carried") return `${source} → ${rest[0]} = ${rest[1]}`;
  if (key === "converted") return `${source} = ${rest[0]} → ${rest[1]} = ${rest[2]} (${rest[3]})`;
  if (key === "defaulted") return `${source} = ${rest[0]}`;
  return rest.length ? `${source}: ${rest.join(" ")}` : (source ?? "");
}

export function TomlPane({ document, onApply }: { document: Document; onApply: (document: Document) => void }) {
  const [text, setText] = useState("");
  const [wrong, setWrong] = useState("");
  const [done, setDone] = useState(false);
  useEffect(() => {
    send<{ text: string }>("POST", "config/toml", { document })
      .then((answer) => setText(answer.text))
      .catch((problem: unknown) => setWrong(why(problem)));
  }, [document]);
  const apply = () =>
    send<{ document: Document }>("POST", "config/parse", { text })
      .then((answer) => {
        setWrong("");
        setDone(true);
        onApply(answer.document);
      })
      .catch((problem: unknown) => setWrong(why(problem)));
  const download = () => save("run.toml", new Blob([text], { type: "application/toml" }));
  return (
    <Card title="Run file">
      <label htmlFor="toml" className="sr-only">
        Run file as TOML
      </label>
      <textarea id="toml" spellCheck={false} className={cn(inputLook, "h-[60vh] font-mono text-xs")} value={text}
        onChange={(event) => {
          setDone(false);
          setText(event.target.value);
        }}
      />
      {wrong && (
        <p role="alert" className="mt-2 text-sm text-bad">
          {wrong}
        </p>
      )}
      <div className="mt-2 flex gap-2">
        <Button look="main" onClick={() => void apply()}>
          Apply to the form
        </Button>
        <Button onClick={download}>Download</Button>
        <p role="status" className="self-center text-sm text-muted">
          {done && !wrong ? "Applied." : ""}
        </p>
      </div>
    </Card>
  );
}


const SECRETS = [
  { name: "HF_TOKEN", label: "Hub token (HF_TOKEN)" },
  { name: "WANDB_API_KEY", label: "W&B key (WANDB_API_KEY)" },
];

/** Secrets that runs of this server get; they are written, never read. */
export function Secrets() {
  const [open, setOpen] = useState(false);
  const [set, setSet] = useState<Record<string, boolean>>({});
  const [said, setSaid] = useState("");
  useEffect(() => {
    if (!open) return;
    setSaid("");
    get<{ set: Record<string, boolean> }>("secrets").then((answer) => setSet(answer.set)).catch((problem: unknown) => setSaid(why(problem)));
  }, [open]);
  const keep = (name: string, value: string) =>
    send<{ set: Record<string, boolean> }>("PUT", "secrets", { name, value })
      .then((answer) => {
        setSet(answer.set);
        setSaid(value ? `${name} is kept until the server ends.` : `${name} is forgotten.`);
      })
      .catch((problem: unknown) => setSaid(why(problem)));
  return (
    <>
      <Button onClick={() => setOpen(true)}>Secrets</Button>
      <Dialog open={open} onOpenChange={setOpen} title="Secrets" about="Given to runs that this page starts, as variables of their environment; kept in the server's memory and in no file. Set in the server's own environment, they are passed on too.">
        <div className="grid gap-3">
          {SECRETS.map((each) => (
            <form
              key={each.name}
              className="flex flex-wrap items-end gap-2"
              onSubmit={(event) => {
                event.preventDefault();
                const input = event.currentTarget.elements.namedItem("value") as HTMLInputElement;
                void keep(each.name, input.value);
                input.value = "";
              }}
            >
              <label className="min-w-56 flex-1 text-sm font-medium">
                {each.label} {set[each.name] ? "(set)" : "(not set)"}
                <input name="value" type="password" autoComplete="off" className={inputLook} />
              </label>
              <Button look="main" type="submit">
                {set[each.name] ? "Replace, or forget" : "Keep"}
              </Button>
            </form>
          ))}
        </div>
        <p role="status" aria-live="polite" className="mt-2 text-sm">
          {said}
        </p>
      </Dialog>
    </>
  );
}

/** In what a run file differs from the defaults, a saved one, a template, or that of a run. */
export function Differences({ document, runs }: { document: Document; runs: Run[] }) {
  const [open, setOpen] = useState(false);
  const [names, setNames] = useState<{ saved: string[]; templates: string[] }>({ saved: [], templates: [] });
  const [other, setOther] = useState("d:");
  const [rows, setRows] = useState<Difference[]>([]);
  const [said, setSaid] = useState("");
  useEffect(() => {
    if (open) void get<typeof names>("configs").then(setNames).catch(() => undefined);
  }, [open]);
  useEffect(() => {
    if (!open) return;
    const [kind, chosen] = [other.slice(0, 1), other.slice(2)];
    const theirs = async (): Promise<Document> => {
      if (kind === "d") return {};
      if (kind === "r") return (await send<{ document: Document }>("POST", "config/parse", { text: (await get<RunDetail>(`runs/${chosen}`)).toml })).document;
      return (await get<{ document: Document }>(`configs/${encodeURIComponent(chosen)}?template=${kind === "t"}`)).document;
    };
    let ended = false;
    theirs()
      .then((found) => send<Difference[]>("POST", "config/differences", { ours: document, theirs: found }))
      .then((found) => {
        if (ended) return;
        setRows(found);
        setSaid(found.length ? "" : "There is no difference.");
      })
      .catch((problem: unknown) => setSaid(why(problem)));
    return () => {
      ended = true;
    };
  }, [document, open, other]);
  const group = (label: string, kind: string, entries: { value: string; label: string }[]) =>
    entries.length > 0 && (
      <optgroup label={label}>
        {entries.map((each) => (
          <option key={each.value} value={`${kind}:${each.value}`}>
            {each.label}
          </option>
        ))}
      </optgroup>
    );
  const plain = (value: string) => ({ value, label: value });
  return (
    <>
      <Button onClick={() => setOpen(true)}>Differences</Button>
      <Dialog open={open} onOpenChange={setOpen} wide title="Differences" about="Settings as they would be used, in which this run file differs from another one.">
        <label className="text-sm font-medium">
          Compare with
          <select className={cn(inputLook, "mb-3")} value={other} onChange={(event) => setOther(event.target.value)}>
            <option value="d:">the defaults</option>
            {group("Saved", "s", names.saved.map(plain))}
            {group("Templates", "t", names.templates.map(plain))}
            {group("Runs", "r", runs.map((run) => ({ value: run.id, label: `${run.name} (${run.folder})` })))}
          </select>
        </label>
        <p role="status" className="text-sm">
          {said}
        </p>
        {rows.length > 0 && <Rows heads={["setting", "here", "there"]} rows={rows.map((row) => [row.key, shown(row.ours), shown(row.theirs)].map((value, place) => <span key={place} className={cn("wrap-anywhere", place === 0 && "font-mono text-xs")}>{value}</span>))} />}
      </Dialog>
    </>
  );
}
