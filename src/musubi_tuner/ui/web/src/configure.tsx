// The form: seven tabs made from the schema, checked as it is typed, beside the run file as text.

import { Tabs } from "radix-ui";
import { useCallback, useDeferredValue, useEffect, useMemo, useRef, useState } from "react";
import { Failure, get, send, why } from "./api";
import { Datasets } from "./datasets";
import { entriesOf, isIn, matching, type Scope, valueAt, WHOLE, withValue } from "./document";
import { Field, Findings } from "./field";
import { Differences, Files, SaveAs, Secrets, TomlPane } from "./files";
import { Length, Needs, Noise, Plan, Rates } from "./outlook";
import { Badge, Button, Card, Dialog, inputLook, useLater } from "./parts";
import { Pictures } from "./pictures";
import { isOfStep, Scopes } from "./steps";
import type { Checked, Document, Finding, FormField, Preview, Run, Schema, Started } from "./types";

const DRAFT = "musubi-draft";
export const NEW: Document = { schema_version: 1, run: { name: "my-run", output_dir: "data/output/my-run" }, model: { arch: "tf" } };
const WAIT = 250;
const WAIT_FOR_DATA = 600;

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

export function Configure({ schema, given, active, runs, onStarted }: { schema: Schema; given: Document | null; active: boolean; runs: Run[]; onStarted: (run: Started) => void }) {
  const [document, setDocument] = useState<Document>(firstDocument);
  const [chosenScope, setScope] = useState<Scope>(WHOLE);
  const [name, setName] = useState("");
  const [tag, setTag] = useState<string | null>(null);
  const [kept, setKept] = useState<Document | null>(null);
  const [checked, setChecked] = useState<Checked | null>(null);
  const [tab, setTab] = useState(schema.tabs[0]?.name ?? "");
  const [words, setWords] = useState("");
  const [expert, setExpert] = useState(false);
  const [said, setSaid] = useState("");
  const [asText, setAsText] = useState(false);
  const number = useRef(0);
  const [preview, setPreview] = useState<Preview | null>(null);
  const [noPreview, setNoPreview] = useState("");

  const written = String(valueAt(document, "model.arch") ?? "");
  const arch = schema.families.find((each) => each.full_name === written)?.code ?? written;
  const family = schema.families.find((each) => each.code === arch);
  const fields = useMemo(() => schema.fields.map((field) => ({ ...field, ...field.own[arch] })), [arch, schema.fields]);
  const byName = useMemo(() => new Map(fields.map((field) => [field.key, field])), [fields]);
  const steps = entriesOf(document, "steps");
  // A step or a role that is no longer there is left.
  const scope = useMemo<Scope>(
    () => ({ step: chosenScope.step !== null && chosenScope.step < steps.length ? chosenScope.step : null, role: family?.roles.includes(chosenScope.role) ? chosenScope.role : "" }),
    [chosenScope, steps.length, family],
  );

  const [loads, setLoads] = useState(0);
  /** Put a run file into the form; false if the person keeps what is there. */
  const load = (loaded: Document, from: string, of: string | null): boolean => {
    if (document !== kept && document !== NEW && !confirm("Replace what is in the form? It was edited since it was loaded or saved.")) return false;
    setDocument(loaded);
    setScope(WHOLE);
    setName(from);
    setTag(of);
    setKept(loaded);
    setLoads((before) => before + 1);
    return true;
  };
  const latestLoad = useRef(load);
  latestLoad.current = load;
  useEffect(() => {
    if (given) latestLoad.current(given, "", null);
  }, [given]);

  useLater(
    () => {
      const draft = fields.filter((field) => field.secret).reduce((found, field) => withValue(found, field.key, undefined), document);
      localStorage.setItem(DRAFT, JSON.stringify(draft));
      const mine = ++number.current;
      send<Checked>("POST", "config/validate", { document, number: mine })
        .then((answer) => {
          // Later answers win; an answer without values keeps those that are shown.
          if (answer.number === number.current)
            setChecked((before) => (Object.keys(answer.resolved).length || answer.steps.length || !before ? answer : { ...before, diagnostics: answer.diagnostics }));
        })
        .catch((problem: unknown) => setSaid(why(problem)));
    },
    WAIT,
    document,
  );

  const change = useCallback((key: string, value: unknown) => setDocument((before) => withValue(before, key, value, scope)), [scope]);
  const fix = useCallback(
    (finding: Finding) => setDocument((before) => finding.fix.reduce((found, [key, value]) => withValue(found, key, value ?? undefined, { step: finding.step, role: "" }), before)),
    [],
  );

  const findings = useMemo(() => checked?.diagnostics ?? [], [checked]);
  /** The setting that a finding is about, or is a part of, and the scope in which it is edited. */
  const placeOf = useCallback(
    (finding: Finding): { field: FormField | undefined; scope: Scope } => {
      const key = finding.keys[0] ?? "";
      const role = /^roles\.(\w+)\.(.+)$/.exec(key);
      let name = role ? (role[2] === "max_grad_norm" ? "train.max_grad_norm" : (role[2] ?? "")) : key;
      while (name && !byName.has(name)) name = name.replace(/(\.[^.[]*|\[\d+\]|[^.[\]]+)$/, "");
      return { field: byName.get(name), scope: { step: finding.step, role: role && name ? (role[1] ?? "") : "" } };
    },
    [byName],
  );
  const byKey = useMemo(() => {
    const found = new Map<string, Finding[]>();
    for (const finding of findings) {
      const place = placeOf(finding);
      if (finding.step !== scope.step || !place.field) continue;
      const key = place.scope.role === scope.role ? place.field.key : scope.role ? "" : `roles.${place.scope.role}`;
      found.set(key, [...(found.get(key) ?? []), finding]);
    }
    return found;
  }, [findings, placeOf, scope]);
  const used = scope.step === null ? checked : (checked?.steps[scope.step] ?? null);
  const idle = useMemo(() => new Set(scope.role ? [] : used?.idle), [scope.role, used]);
  const errors = findings.filter((finding) => finding.level === "error");
  const warnings = findings.filter((finding) => finding.level === "warning");
  const ready = checked !== null && !errors.length;

  const isShown = useCallback(
    (field: FormField): boolean => {
      if (field.table === "datasets" || field.secret || !isIn(field, scope)) return false;
      if (valueAt(document, field.key, scope) !== undefined || byKey.has(field.key)) return true;
      if (field.families.length && arch && !field.families.includes(arch)) return false;
      if (used && field.table !== "general" && Object.keys(used.resolved).length && !(field.key in used.resolved)) return false;
      return !(idle.has(field.key) || (field.expert && !expert));
    },
    [arch, byKey, document, expert, idle, scope, used],
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
      send<Preview>("POST", "config/preview", { document, number: mine, step: scope.step ?? 0 })
        .then((answer) => {
          if (answer.number !== asked.current) return;
          setPreview(answer.problem ? null : answer);
          setNoPreview(answer.problem);
        })
        .catch((problem: unknown) => {
          if (mine !== asked.current) return;
          setPreview(null);
          setNoPreview(why(problem));
        });
    },
    WAIT_FOR_DATA,
    // Another step has another length.
    useMemo(() => [checked, scope.step], [checked, scope.step]),
  );

  const search = useDeferredValue(words);
  const hits = useMemo(() => matching(fields, search).filter((field) => isIn(field, scope)), [fields, scope, search]);
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

  const inherited = (field: FormField): unknown => {
    const inRole = scope.role ? (scope.step === null ? valueAt(document, field.key) : valueAt(document, field.key, { ...scope, role: "" })) : undefined;
    return inRole ?? used?.resolved[field.key] ?? valueAt(document, field.key) ?? family?.defaults[field.key] ?? field.default;
  };
  const render = (field: FormField) => (
    <Field
      key={`${scope.step} ${scope.role} ${field.key}`}
      field={field}
      value={valueAt(document, field.key, scope)}
      fallback={inherited(field)}
      origin={scope.role ? "" : used?.origins[field.key]}
      idle={idle.has(field.key)}
      findings={byKey.get(field.key) ?? []}
      onChange={(value) => change(field.key, value)}
      onFix={fix}
    />
  );

  const asToml = async () => (await send<{ text: string }>("POST", "config/toml", { document })).text;
  const attempt = async (action: () => Promise<void>) => {
    try {
      await action();
    } catch (problem) {
      setSaid(why(problem));
    }
  };
  const starting = useRef(false);
  const start = () =>
    attempt(async () => {
      if (starting.current) return;
      starting.current = true;
      try {
        await begin();
      } finally {
        starting.current = false;
      }
    });
  const begin = async () => {
      const answer = await send<Started>("POST", "runs", { text: await asToml() });
      setSaid("The run has been started.");
      onStarted(answer);
  };
  const enqueue = () =>
    attempt(async () => {
      const entry = await send<{ name: string }>("POST", "queue", { text: await asToml() });
      setSaid(`${entry.name} waits in the queue; later edits do not change it.`);
    });
  const save = async (as: string) => {
    try {
      const answer = await send<{ tag: string }>("PUT", `configs/${encodeURIComponent(as)}`, { text: await asToml(), tag: as === name ? tag : null });
      setName(as);
      setTag(answer.tag);
      setKept(document);
      setSaid(`Saved as ${as}.`);
    } catch (problem) {
      setSaid(problem instanceof Failure && problem.status === 412 ? `${as} was saved by another page, or exists; load it, or choose another name.` : why(problem));
    }
  };

  const tabOf = (finding: Finding): string => {
    const table = /^[^.[]*/.exec(finding.keys[0] ?? "")?.[0] ?? "";
    return placeOf(finding).field?.tab ?? (table === "datasets" ? "dataset" : (fields.find((field) => field.table === table && !field.secret)?.tab ?? "setup"));
  };
  /** Whether no control shows it: its key is unknown or a secret, or it is about a table. */
  const isHomeless = (finding: Finding): boolean => {
    const field = placeOf(finding).field;
    return finding.level !== "info" && !finding.keys[0]?.startsWith("datasets[") && !(finding.step !== null && finding.step === scope.step && isOfStep(finding)) && (!field || field.secret);
  };
  const focusField = (finding: Finding) => {
    const place = placeOf(finding);
    setWords("");
    setAsText(false);
    setScope(place.scope);
    setTab(tabOf(finding));
    const key = finding.keys[0]?.startsWith("datasets[") ? finding.keys[0] : (place.field?.key ?? "");
    setTimeout(() => window.document.querySelector<HTMLElement>(`[data-key="${CSS.escape(key)}"] :is(input,select)`)?.focus(), 50);
  };
  const countOf = (of: string, level: Finding["level"]) => findings.filter((finding) => finding.level === level && tabOf(finding) === of).length;
  const changed = useMemo(() => {
    const found = new Map<string, number>();
    for (const field of fields) if (field.table !== "datasets" && valueAt(document, field.key, scope) !== undefined) found.set(field.tab, (found.get(field.tab) ?? 0) + 1);
    return found;
  }, [document, fields, scope]);

  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (!active || window.document.querySelector("[role=dialog]")) return;
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
      } else if ((event.ctrlKey || event.metaKey) && event.key === "Enter" && ready) {
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

  const unsaved = name && kept && kept !== document ? " (edited since)" : "";
  const grid = "grid grid-cols-1 items-start gap-x-4 gap-y-1 lg:grid-cols-2";
  return (
    <div className="pb-28">
      <div className="mb-3 flex flex-wrap items-end gap-3">
        <Files
          empty={NEW}
          onLoad={load}
          onGone={(gone) => {
            if (gone === name) setTag(null);
          }}
          onSaid={setSaid}
        />
        <Button onClick={() => setAsText((before) => !before)} aria-pressed={asText}>
          {asText ? "Form" : "View as TOML"}
        </Button>
        <Differences document={document} runs={runs} />
        <Secrets />
      </div>
      <div className="mb-3 flex flex-wrap items-end gap-3">
        <div className="min-w-48 flex-1">
          <label htmlFor="search" className="text-sm font-medium">
            Search settings (also by names of other trainers)
          </label>
          <input id="search" className={inputLook} type="search" value={words} onChange={(event) => setWords(event.target.value)} placeholder="learning rate, network_dim, --flip_aug ..." />
        </div>
        <label className="flex min-h-9 items-center gap-2 text-sm">
          <input type="checkbox" className="size-5" checked={expert} onChange={(event) => setExpert(event.target.checked)} /> Show expert settings
        </label>
      </div>

      {asText ? (
        <TomlPane document={document} onApply={setDocument} />
      ) : (
        <>
          <Scopes key={loads} document={document} scope={scope} roles={family?.roles ?? []} findings={findings} onScope={setScope} onChange={setDocument} />
          {search.trim() ? (
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
                  const set = changed.get(each.name) ?? 0;
                  return (
                    <Tabs.Trigger key={each.name} value={idOf(each.name)} className="min-h-9 border-b-2 border-transparent px-3 text-sm data-[state=active]:border-accent data-[state=active]:font-semibold">
                      {each.title}
                      {set > 0 && <span className="ml-1.5 text-xs font-normal text-muted" title={`${set} settings are not left at their defaults`}>{set} set</span>}
                      {wrong > 0 && <span className="ml-1.5 rounded-full border border-bad px-1.5 text-xs text-bad">{wrong} {wrong > 1 ? "errors" : "error"}</span>}
                      {warned > 0 && <span className="ml-1.5 rounded-full border border-warn px-1.5 text-xs text-warn">{warned} {warned > 1 ? "warnings" : "warning"}</span>}
                    </Tabs.Trigger>
                  );
                })}
              </Tabs.List>
              {schema.tabs.map((each) => (
                <Tabs.Content key={each.name} value={idOf(each.name)} className="grid min-w-0 grid-cols-1 gap-4">
                  <Findings named findings={findings.filter((finding) => isHomeless(finding) && tabOf(finding) === each.name)} onFix={fix} />
                  {each.name === "setup" && <Needs document={document} ready={ready} />}
                  {each.name === "dataset" && <Length preview={preview} problem={noPreview} />}
                  {each.name === "learning rate" && preview && <Rates preview={preview} />}
                  {each.name === "advanced" && ready && !scope.role && <Noise key={scope.step ?? 0} document={document} step={scope.step ?? 0} />}
                  {each.name === "dataset" && scope.step === null && !scope.role && (
                    <>
                      <Datasets fields={fields} document={document} findings={findings} onChange={setDocument} onFix={fix} />
                      <Pictures document={document} disabled={!ready} />
                    </>
                  )}
                  {groups(fields.filter((field) => field.tab === each.name && isShown(field))).map(([table, fields]) => (
                    <Card key={table} title={<code className="text-sm">[{table || "file"}]</code>}>
                      <div className={grid}>{fields.map(render)}</div>
                    </Card>
                  ))}
                </Tabs.Content>
              ))}
            </Tabs.Root>
          )}
        </>
      )}

      <div className="fixed inset-x-0 bottom-0 z-30 border-t border-line bg-panel">
        <div className="mx-auto flex max-w-6xl flex-wrap items-center gap-2 px-4 py-2">
          <Found findings={[...errors, ...warnings]} errors={errors.length} warnings={warnings.length} onGo={focusField} />
          <p role="status" aria-live="polite" className="min-w-0 flex-1 text-sm break-words whitespace-pre-wrap">
            {said || (checked?.title ? `${checked.title}${name ? `, ${name}${unsaved}` : ""}` : "")}
          </p>
          <SaveAs name={name} onSave={save} />
          <Plan document={document} disabled={!ready} />
          <Button disabled={!ready} onClick={() => void enqueue()}>
            Add to queue
          </Button>
          <Button look="main" disabled={!ready} onClick={() => void start()} title={errors.length ? "Errors must be mended first" : "Ctrl+Enter"}>
            {errors.length ? `Start (mend ${errors.length} ${errors.length > 1 ? "errors" : "error"} first)` : checked ? "Start training" : "Checking …"}
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
                <Badge of={finding.level}>{finding.level}</Badge> <code>
                  {finding.step !== null && `steps[${finding.step}].`}
                  {finding.keys[0]}
                </code>
                : {finding.reason}
              </button>
            </li>
          ))}
        </ul>
      </Dialog>
    </>
  );
}

