// The form: seven tabs made from the schema, checked as it is typed, beside the run file as text.

import { Plus, Trash2 } from "lucide-react";
import { Tabs } from "radix-ui";
import { useCallback, useDeferredValue, useEffect, useMemo, useRef, useState } from "react";
import { Failure, get, send } from "./api";
import { datasetsOf, matching, valueAt, withValue } from "./document";
import { Field } from "./field";
import { Badge, Button, Card, cn, Dialog, inputLook, Rows } from "./parts";
import { Pictures } from "./pictures";
import { Chart } from "./chart";
import type { Checked, Document, Finding, FormField, Preview, Schema, Table } from "./types";

const DRAFT = "musubi-draft";
const NEW: Document = { schema_version: 1, run: { name: "my-run", output_dir: "data/output/my-run" }, model: { arch: "tf" } };
const WAIT = 250;
const WAIT_FOR_DATA = 600;

/** Of several changes within the time, the last one. */
function useLater(action: () => void, wait: number, watched: unknown): void {
  const latest = useRef(action);
  latest.current = action;
  useEffect(() => {
    const timer = setTimeout(() => latest.current(), wait);
    return () => clearTimeout(timer);
  }, [wait, watched]);
}

/** The name of a tab where it becomes part of an id, which has no spaces. */
const idOf = (name: string): string => name.replaceAll(" ", "-");

function firstDocument(): Document {
  try {
    const kept: unknown = JSON.parse(localStorage.getItem(DRAFT) ?? "null");
    if (kept && typeof kept === "object") return kept as Document;
  } catch {
    // a draft that is none
  }
  return NEW;
}

export function Configure({ schema, given, onStarted }: { schema: Schema; given: Document | null; onStarted: (id: string | null) => void }) {
  const [document, setDocument] = useState<Document>(() => given ?? firstDocument());
  const [name, setName] = useState("");
  const [tag, setTag] = useState<string | null>(null);
  const [checked, setChecked] = useState<Checked | null>(null);
  const [tab, setTab] = useState(schema.tabs[0]?.name ?? "");
  const [words, setWords] = useState("");
  const [expert, setExpert] = useState(false);
  const [said, setSaid] = useState("");
  const [asText, setAsText] = useState(false);
  const number = useRef(0);
  const [preview, setPreview] = useState<Preview | null>(null);
  const [noPreview, setNoPreview] = useState("");

  useEffect(() => {
    if (given) setDocument(given);
  }, [given]);

  useLater(
    () => {
      localStorage.setItem(DRAFT, JSON.stringify(document));
      const mine = ++number.current;
      send<Checked>("POST", "config/validate", { document, number: mine })
        .then((answer) => {
          // Later answers win; an answer without values keeps those that are shown.
          if (answer.number === number.current)
            setChecked((before) => (Object.keys(answer.resolved).length || !before ? answer : { ...before, diagnostics: answer.diagnostics }));
        })
        .catch((problem: unknown) => setSaid(String(problem)));
    },
    WAIT,
    document,
  );

  const change = useCallback((key: string, value: unknown) => setDocument((before) => withValue(before, key, value)), []);
  const fix = useCallback((finding: Finding) => setDocument((before) => finding.fix.reduce((found, [key, value]) => withValue(found, key, value ?? undefined), before)), []);

  const findings = checked?.diagnostics ?? [];
  const byKey = useMemo(() => {
    const found = new Map<string, Finding[]>();
    for (const finding of findings) {
      const key = finding.keys[0] ?? "";
      found.set(key, [...(found.get(key) ?? []), finding]);
    }
    return found;
  }, [findings]);
  const idle = useMemo(() => new Set(checked?.idle), [checked]);
  const errors = findings.filter((finding) => finding.level === "error");
  const warnings = findings.filter((finding) => finding.level === "warning");
  const arch = String(valueAt(document, "model.arch") ?? "");

  const isShown = useCallback(
    (field: FormField): boolean => {
      if (field.table === "datasets" || field.secret) return false;
      if (valueAt(document, field.key) !== undefined || byKey.has(field.key)) return true;
      if (field.families.length && arch && !field.families.includes(arch)) return false;
      if (checked && field.table !== "general" && Object.keys(checked.resolved).length && !(field.key in checked.resolved)) return false;
      return !(idle.has(field.key) || (field.expert && !expert));
    },
    [arch, byKey, checked, document, expert, idle],
  );

  // The data are looked at once the settings are right, and not at every letter.
  const asked = useRef(0);
  useLater(
    () => {
      if (!checked || errors.length) {
        setNoPreview("The length is known once the errors are mended.");
        return;
      }
      const mine = ++asked.current;
      send<Preview>("POST", "config/preview", { document, number: mine })
        .then((answer) => {
          if (answer.number !== asked.current) return;
          setPreview(answer.problem ? null : answer);
          setNoPreview(answer.problem);
        })
        .catch((problem: unknown) => {
          if (mine !== asked.current) return;
          setPreview(null);
          setNoPreview(problem instanceof Error ? problem.message : String(problem));
        });
    },
    WAIT_FOR_DATA,
    checked,
  );

  const search = useDeferredValue(words);
  const hits = useMemo(() => matching(schema.fields, search), [schema.fields, search]);
  const [explained, setExplained] = useState("");
  useEffect(() => {
    setExplained("");
    if (!search.trim()) return;
    const timer = setTimeout(() => {
      get<{ text: string }>(`explain?name=${encodeURIComponent(search.replace(/^-+/, "").trim())}`)
        .then((answer) => setExplained(answer.text))
        .catch(() => setExplained(""));
    }, WAIT);
    return () => clearTimeout(timer);
  }, [search]);

  const render = (field: FormField) => (
    <Field
      key={field.key}
      field={field}
      value={valueAt(document, field.key)}
      fallback={checked?.resolved[field.key] ?? schema.families.find((family) => family.code === arch)?.defaults[field.key] ?? field.default}
      idle={idle.has(field.key)}
      findings={byKey.get(field.key) ?? []}
      onChange={(value) => change(field.key, value)}
      onFix={fix}
    />
  );

  const start = async () => {
    try {
      const { text } = await send<{ text: string }>("POST", "config/toml", { document });
      const answer = await send<{ id: string | null }>("POST", "runs", { text });
      setSaid("The run has been started.");
      onStarted(answer.id);
    } catch (problem) {
      setSaid(problem instanceof Failure ? problem.message : String(problem));
    }
  };

  const enqueue = async () => {
    try {
      const { text } = await send<{ text: string }>("POST", "config/toml", { document });
      const entry = await send<{ name: string }>("POST", "queue", { text });
      setSaid(`${entry.name} waits in the queue; later edits do not change it.`);
    } catch (problem) {
      setSaid(problem instanceof Failure ? problem.message : String(problem));
    }
  };

  const save = async (as: string) => {
    try {
      const { text } = await send<{ text: string }>("POST", "config/toml", { document });
      const answer = await send<{ tag: string }>("PUT", `configs/${encodeURIComponent(as)}`, { text, tag: as === name ? tag : null });
      setName(as);
      setTag(answer.tag);
      setSaid(`Saved as ${as}.`);
    } catch (problem) {
      setSaid(problem instanceof Failure && problem.status === 412 ? `${as} was saved by another page, or exists; load it, or choose another name.` : String(problem));
    }
  };

  const focusField = (finding: Finding) => {
    const key = finding.keys[0] ?? "";
    const field = schema.fields.find((each) => each.key === key);
    setWords("");
    setTab(field?.tab ?? (key.startsWith("dataset") ? "dataset" : tab));
    setTimeout(() => window.document.querySelector<HTMLElement>(`[data-key="${CSS.escape(key)}"] :is(input,select)`)?.focus(), 50);
  };

  const countOf = (of: string, level: Finding["level"]) =>
    findings.filter((finding) => finding.level === level && (schema.fields.find((field) => field.key === finding.keys[0])?.tab ?? (finding.keys[0]?.startsWith("dataset") ? "dataset" : "setup")) === of).length;

  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      const typing = event.target instanceof HTMLElement && /INPUT|TEXTAREA|SELECT/.test(event.target.tagName);
      if (event.key === "/" && !typing) {
        event.preventDefault();
        window.document.getElementById("search")?.focus();
      } else if (event.altKey && /^[1-9]$/.test(event.key)) {
        const chosen = schema.tabs[Number(event.key) - 1];
        if (chosen) {
          event.preventDefault();
          setWords("");
          setTab(chosen.name);
        }
      } else if ((event.ctrlKey || event.metaKey) && event.key === "Enter" && checked && !errors.length) {
        event.preventDefault();
        void start();
      } else if ((event.ctrlKey || event.metaKey) && event.key === "s" && name) {
        event.preventDefault();
        void save(name);
      }
    };
    window.addEventListener("keydown", onKey);
    return () => window.removeEventListener("keydown", onKey);
  });

  const grid = "grid grid-cols-1 items-start gap-x-4 gap-y-1 lg:grid-cols-2";
  return (
    <div className="pb-28">
      <div className="mb-3 flex flex-wrap items-end gap-3">
        <Files
          onLoad={(loaded, from, of) => {
            setDocument(loaded);
            setName(from);
            setTag(of);
          }}
          onSaid={setSaid}
        />
        <div className="min-w-48 flex-1">
          <label htmlFor="search" className="text-sm font-medium">
            Search settings (also by names of other trainers)
          </label>
          <input id="search" className={inputLook} type="search" value={words} onChange={(event) => setWords(event.target.value)} placeholder="learning rate, network_dim, --flip_aug ..." />
        </div>
        <label className="flex min-h-9 items-center gap-2 text-sm">
          <input type="checkbox" className="size-5" checked={expert} onChange={(event) => setExpert(event.target.checked)} /> Show expert settings
        </label>
        <Button onClick={() => setAsText((before) => !before)} aria-pressed={asText}>
          {asText ? "Form" : "View as TOML"}
        </Button>
      </div>

      {asText ? (
        <TomlPane document={document} onApply={setDocument} />
      ) : search.trim() ? (
        <Card title={`${hits.length} settings for “${search}”`}>
          {explained && <pre className="mb-3 overflow-x-auto rounded bg-ground p-2 text-xs whitespace-pre-wrap">{explained}</pre>}
          <div className={grid}>{hits.filter((field) => field.table !== "datasets" && !field.secret).slice(0, 60).map(render)}</div>
        </Card>
      ) : (
        <Tabs.Root value={idOf(tab)} onValueChange={(chosen) => setTab(schema.tabs.find((each) => idOf(each.name) === chosen)?.name ?? tab)}>
          <Tabs.List aria-label="Settings" className="mb-3 flex flex-wrap gap-1 border-b border-line">
            {schema.tabs.map((each) => {
              const wrong = countOf(each.name, "error");
              const warned = countOf(each.name, "warning");
              return (
                <Tabs.Trigger key={each.name} value={idOf(each.name)} className="min-h-9 border-b-2 border-transparent px-3 text-sm data-[state=active]:border-accent data-[state=active]:font-semibold">
                  {each.title}
                  {wrong > 0 && <span className="ml-1.5 rounded-full border border-bad px-1.5 text-xs text-bad">{wrong} {wrong > 1 ? "errors" : "error"}</span>}
                  {!wrong && warned > 0 && <span className="ml-1.5 rounded-full border border-warn px-1.5 text-xs text-warn">{warned}</span>}
                </Tabs.Trigger>
              );
            })}
          </Tabs.List>
          {schema.tabs.map((each) => (
            <Tabs.Content key={each.name} value={idOf(each.name)} className="grid min-w-0 grid-cols-1 gap-4">
              {each.name === "dataset" && <Length preview={preview} problem={noPreview} />}
              {each.name === "learning rate" && preview && <Rates preview={preview} />}
              {each.name === "dataset" && <Datasets schema={schema} document={document} findings={findings} onChange={setDocument} onFix={fix} />}
              {each.name === "dataset" && <Pictures document={document} disabled={!checked || errors.length > 0} />}
              {groups(schema.fields.filter((field) => field.tab === each.name && isShown(field))).map(([table, fields]) => (
                <Card key={table} title={<code className="text-sm">[{table || "file"}]</code>}>
                  <div className={grid}>{fields.map(render)}</div>
                </Card>
              ))}
            </Tabs.Content>
          ))}
        </Tabs.Root>
      )}

      <div className="fixed inset-x-0 bottom-0 z-30 border-t border-line bg-panel">
        <div className="mx-auto flex max-w-6xl flex-wrap items-center gap-2 px-4 py-2">
          <Found findings={[...errors, ...warnings]} errors={errors.length} warnings={warnings.length} onGo={focusField} />
          <p role="status" aria-live="polite" className="min-w-0 flex-1 text-sm break-words whitespace-pre-wrap">
            {said || (checked?.title ? `${checked.title}${name ? `, ${name}` : ""}` : "")}
          </p>
          <SaveAs name={name} onSave={save} />
          <Plan document={document} disabled={!checked || errors.length > 0} />
          <Button disabled={!checked || errors.length > 0} onClick={() => void enqueue()}>
            Add to queue
          </Button>
          <Button look="main" disabled={!checked || errors.length > 0} onClick={() => void start()} title={errors.length ? "Errors must be mended first" : "Ctrl+Enter"}>
            {errors.length ? `Start (mend ${errors.length} ${errors.length > 1 ? "errors" : "error"} first)` : "Start training"}
          </Button>
        </div>
      </div>
    </div>
  );
}

function groups(fields: FormField[]): [string, FormField[]][] {
  const found = new Map<string, FormField[]>();
  for (const field of fields) found.set(field.table, [...(found.get(field.table) ?? []), field]);
  return [...found];
}

function Found(props: { findings: Finding[]; errors: number; warnings: number; onGo: (finding: Finding) => void }) {
  const [open, setOpen] = useState(false);
  return (
    <>
      <Button onClick={() => setOpen(true)} disabled={!props.findings.length} aria-live="polite">
        {props.errors} {props.errors === 1 ? "error" : "errors"}, {props.warnings} {props.warnings === 1 ? "warning" : "warnings"}
      </Button>
      <Dialog open={open} onOpenChange={setOpen} title="What was found" about="Choose one to go to its setting.">
        <ul className="grid gap-2">
          {props.findings.map((finding, number) => (
            <li key={number}>
              <button
                type="button"
                className="w-full rounded-md border border-line p-2 text-left text-sm hover:bg-ground"
                onClick={() => {
                  setOpen(false);
                  props.onGo(finding);
                }}
              >
                <Badge of={finding.level}>{finding.level}</Badge> <code>{finding.keys[0]}</code>: {finding.reason}
              </button>
            </li>
          ))}
        </ul>
      </Dialog>
    </>
  );
}

/** What the run needs, as `train.py --plan` says it: memory, disk, time, caches. */
function Plan({ document, disabled }: { document: Document; disabled: boolean }) {
  const [open, setOpen] = useState(false);
  const [found, setFound] = useState<{ code: number; text: string } | null>(null);
  const asked = useRef(0);
  const make = async () => {
    const mine = ++asked.current;
    setOpen(true);
    setFound(null);
    const show = (answer: { code: number; text: string }) => mine === asked.current && setFound(answer);
    try {
      const { text } = await send<{ text: string }>("POST", "config/toml", { document });
      show(await send<{ code: number; text: string }>("POST", "config/plan", { text }));
    } catch (problem) {
      show({ code: 1, text: problem instanceof Error ? problem.message : String(problem) });
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
            <p className="text-sm">Being made; the first time of a model this takes half a minute …</p>
          )}
        </div>
      </Dialog>
    </>
  );
}

function SaveAs({ name, onSave }: { name: string; onSave: (as: string) => Promise<void> }) {
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

function Files({ onLoad, onSaid }: { onLoad: (document: Document, name: string, tag: string | null) => void; onSaid: (text: string) => void }) {
  const [names, setNames] = useState<{ saved: string[]; templates: string[] }>({ saved: [], templates: [] });
  const refresh = () => void get<typeof names>("configs").then(setNames).catch(() => undefined);
  useEffect(refresh, []);
  const file = useRef<HTMLInputElement>(null);
  return (
    <div className="flex min-w-0 flex-wrap items-end gap-2">
      <div className="min-w-0">
        <label htmlFor="load" className="text-sm font-medium">
          Load config
        </label>
        <select
          id="load"
          className={inputLook}
          value=""
          onFocus={refresh}
          onChange={(event) => {
            const [kind, chosen] = [event.target.value.slice(0, 1), event.target.value.slice(2)];
            get<{ document: Document; tag: string }>(`configs/${encodeURIComponent(chosen)}?template=${kind === "t"}`)
              .then((answer) => {
                onLoad(answer.document, kind === "s" ? chosen : "", kind === "s" ? answer.tag : null);
                onSaid(`Loaded ${chosen}.`);
              })
              .catch((problem: unknown) => onSaid(String(problem)));
          }}
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
      <Button onClick={() => onLoad(NEW, "", null)}>New</Button>
      <Button onClick={() => file.current?.click()}>Import …</Button>
      <input
        ref={file}
        type="file"
        className="hidden"
        aria-label="File to import"
        accept=".toml,.json,.yaml,.yml,.sh,.txt"
        onChange={(event) => {
          const chosen = event.target.files?.[0];
          event.target.value = "";
          if (!chosen) return;
          chosen
            .text()
            .then((text) => send<{ document: Document; report: Record<string, unknown[]> }>("POST", "config/import", { text, name: chosen.name }))
            .then((answer) => {
              onLoad(answer.document, "", null);
              const counts = ["carried", "converted", "defaulted", "dropped_changes_result", "refused", "unknown"];
              onSaid(`Imported ${chosen.name}: ${counts.map((key) => `${(answer.report[key] as unknown[] | undefined)?.length ?? 0} ${key.replaceAll("_", " ")}`).join(", ")}.`);
            })
            .catch((problem: unknown) => onSaid(problem instanceof Error ? problem.message : String(problem)));
        }}
      />
    </div>
  );
}

function TomlPane({ document, onApply }: { document: Document; onApply: (document: Document) => void }) {
  const [text, setText] = useState("");
  const [wrong, setWrong] = useState("");
  const [done, setDone] = useState(false);
  useEffect(() => {
    send<{ text: string }>("POST", "config/toml", { document })
      .then((answer) => setText(answer.text))
      .catch((problem: unknown) => setWrong(String(problem)));
  }, [document]);
  const apply = () =>
    send<{ document: Document }>("POST", "config/parse", { text })
      .then((answer) => {
        setWrong("");
        setDone(true);
        onApply(answer.document);
      })
      .catch((problem: unknown) => setWrong(problem instanceof Error ? problem.message : String(problem)));
  const download = () => {
    const link = window.document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/toml" }));
    link.download = "run.toml";
    link.click();
    URL.revokeObjectURL(link.href);
  };
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

/** How long the run is, its buckets, and a caption as it is drawn. */
function Length({ preview, problem }: { preview: Preview | null; problem: string }) {
  return (
    <Card title={<>Total training steps: {preview ? `${preview.about ? "about " : ""}${preview.total.toLocaleString("en")}` : "~"}</>}>
      <p role="status" className="text-sm break-words whitespace-pre-wrap">
        {preview ? preview.sentence : problem}
      </p>
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

function Rates({ preview }: { preview: Preview }) {
  const lines = useMemo(
    () =>
      preview.rates.map((rate) => ({
        label: rate.label,
        metrics: { curves: { "learning rate": { steps: rate.steps, values: rate.values } }, lost: {}, borders: {} },
      })),
    [preview],
  );
  return (
    <Card title={`Learning rate over ${preview.total.toLocaleString("en")} updates`}>
      <Chart lines={lines} tag="learning rate" logarithmic={false} share={0} />
    </Card>
  );
}

/** The list of data sets: each with the keys that are its own. */
function Datasets(props: { schema: Schema; document: Document; findings: Finding[]; onChange: (document: Document) => void; onFix: (finding: Finding) => void }) {
  const own = props.schema.fields.filter((field) => field.table === "datasets");
  const entries = datasetsOf(props.document);
  const usual = ["image_directory", "captions_file", "cache_directory", "name"];
  const put = (changed: Table[]) => props.onChange(withValue(props.document, "datasets", changed.length ? changed : undefined));
  return (
    <Card title="Data sets">
      <div className="grid grid-cols-1 gap-3">
        {entries.map((entry, number) => {
          const names = [...new Set([...usual, ...Object.keys(entry)])];
          const rest = own.filter((field) => !names.includes(field.name));
          const general = props.schema.fields.filter((field) => field.table === "general" && !names.includes(field.name));
          return (
            <fieldset key={number} className="min-w-0 rounded-md border border-line p-2">
              <legend className="flex items-center gap-2 px-1 text-sm font-medium">
                Data set {number + 1}
                <Button look="bare" className="min-h-6" aria-label={`Remove data set ${number + 1}`} onClick={() => put(entries.filter((_, other) => other !== number))}>
                  <Trash2 size={14} aria-hidden="true" />
                </Button>
              </legend>
              <div className="grid grid-cols-1 items-start gap-x-4 gap-y-1 lg:grid-cols-2">
                {names.map((name) => {
                  const field = [...own, ...props.schema.fields.filter((each) => each.table === "general")].find((each) => each.name === name);
                  if (!field) return null;
                  const key = `datasets[${number}].${name}`;
                  return (
                    <Field
                      key={name}
                      field={{ ...field, key }}
                      value={entry[name]}
                      fallback={field.default}
                      idle={false}
                      findings={props.findings.filter((finding) => finding.keys[0] === key)}
                      onChange={(value) => put(entries.map((other, place) => (place === number ? clean({ ...other, [name]: value }) : other)))}
                      onFix={props.onFix}
                    />
                  );
                })}
              </div>
              <label className="mt-1 flex flex-wrap items-center gap-2 text-sm">
                Add a setting
                <select className={cn(inputLook, "w-auto max-w-full")} value="" onChange={(event) => put(entries.map((other, place) => (place === number ? { ...other, [event.target.value]: "" } : other)))}>
                  <option value="">choose ...</option>
                  {[...rest, ...general].map((field) => (
                    <option key={field.key} value={field.name}>
                      {field.label}
                    </option>
                  ))}
                </select>
              </label>
              {props.findings
                .filter((finding) => finding.keys[0] === `datasets[${number}]`)
                .map((finding, place) => (
                  <p key={place} className="text-sm text-bad">
                    {finding.reason}
                  </p>
                ))}
            </fieldset>
          );
        })}
        <div>
          <Button onClick={() => put([...entries, { image_directory: "" }])}>
            <Plus size={16} aria-hidden="true" /> Add a data set
          </Button>
        </div>
      </div>
    </Card>
  );
}

const clean = (entry: Table): Table => Object.fromEntries(Object.entries(entry).filter(([, value]) => value !== undefined));
