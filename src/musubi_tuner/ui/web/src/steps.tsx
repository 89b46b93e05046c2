// Steps of a run file and roles of its family: which of them the form edits, and the list of steps itself.

import { ArrowLeft, ArrowRight, Plus, Trash2 } from "lucide-react";
import { entriesOf, moved, parsed, type Scope, shown, WHOLE, withValue } from "./document";
import { Findings } from "./field";
import { Button, Card, cn, inputLook } from "./parts";
import type { Document, Finding, FormField, Table } from "./types";

const STARTS = ["previous", "previous_ema", "file"];
/** The keys of a step beside its tables; see docs/steps.md. */
const OWN: { name: string; label: string; help: string; kind: FormField["kind"] }[] = [
  { name: "name", label: "Name", help: "Part of the name of its folder.", kind: "text" },
  { name: "use", label: "Data sets", help: 'Names of its data sets, such as ["style"]; empty = all.', kind: "value" },
  { name: "start", label: "Starts from", help: "Final weights of the previous step, their average, or what the file says.", kind: "choice" },
  { name: "until", label: "Ends early", help: 'Such as {"metric": "loss/main", "below": 0.02}; empty = no.', kind: "value" },
];

/** Whether a finding is about the step itself, not about a setting in one of its tables. */
export const isOfStep = (finding: Finding): boolean => !finding.keys[0] || OWN.some((own) => finding.keys[0]?.split(".")[0] === own.name);

interface Props {
  document: Document;
  scope: Scope;
  roles: string[];
  findings: Finding[];
  onScope: (scope: Scope) => void;
  onChange: (document: Document) => void;
}

export function Scopes({ document, scope, roles, findings, onScope, onChange }: Props) {
  const steps = entriesOf(document, "steps");
  const put = (changed: Table[], step: number | null) => {
    onChange(withValue(document, "steps", changed.length ? changed : undefined));
    onScope({ step, role: "" });
  };
  const add = () => {
    const names = new Set(steps.map((each) => each.name));
    let number = steps.length + 1;
    while (names.has(`step-${number}`)) number++;
    put([...steps, { name: `step-${number}` }], steps.length);
  };
  if (!steps.length && !roles.length)
    return (
      <p className="mb-2 text-sm text-muted">
        One run.{" "}
        <Button look="bare" onClick={add}>
          <Plus size={14} aria-hidden="true" /> Add a step
        </Button>
      </p>
    );
  const wrong = (step: number | null) => findings.filter((finding) => finding.level === "error" && finding.step === step).length;
  const chip = (label: string, step: number | null) => (
    <button
      key={label}
      type="button"
      aria-pressed={scope.step === step}
      className={cn("min-h-9 rounded-md border px-3 text-sm", scope.step === step ? "border-accent font-semibold" : "border-line")}
      onClick={() => onScope({ ...scope, step })}
    >
      {label}
      {wrong(step) > 0 && <span className="ml-1.5 text-xs text-bad">{wrong(step)} {wrong(step) > 1 ? "errors" : "error"}</span>}
    </button>
  );
  const current = scope.step === null ? undefined : steps[scope.step];
  return (
    <Card className="mb-3">
      <div className="flex flex-wrap items-center gap-2">
        <span className="text-sm font-medium">Edit</span>
        <div role="group" aria-label="Steps" className="flex flex-wrap gap-2">
          {chip(steps.length ? "Whole file" : "The run", null)}
          {steps.map((each, number) => chip(`${number + 1}. ${shown(each.name)}`, number))}
        </div>
        <Button look="bare" onClick={add}>
          <Plus size={14} aria-hidden="true" /> Add a step
        </Button>
        {roles.length > 0 && (
          <label className="flex items-center gap-2 text-sm">
            for
            <select aria-label="Role" className={cn(inputLook, "w-auto")} value={scope.role} onChange={(event) => onScope({ ...scope, role: event.target.value })}>
              <option value="">all roles</option>
              {roles.map((each) => (
                <option key={each}>{each}</option>
              ))}
            </select>
          </label>
        )}
      </div>
      {scope.role && <p className="mt-2 text-sm text-muted">Optimizer, schedule, average and gradient norm of {scope.role} alone; what is not set here is as for all roles.</p>}
      {current && scope.step !== null && (
        <div className="mt-3 grid gap-2">
          <div className="grid grid-cols-1 gap-3 sm:grid-cols-2 lg:grid-cols-4">
            {OWN.map((own) => (
              <StepKey key={`${scope.step} ${own.name}`} own={own} value={current[own.name]} isFirst={scope.step === 0} onChange={(value) => onChange(withValue(document, `steps[${scope.step}].${own.name}`, value))} />
            ))}
          </div>
          <Findings findings={findings.filter((finding) => finding.step === scope.step && isOfStep(finding))} onFix={() => undefined} />
          <div className="flex flex-wrap items-center gap-2">
            <Button disabled={scope.step === 0} onClick={() => put(moved(steps, scope.step ?? 0, (scope.step ?? 0) - 1), (scope.step ?? 0) - 1)}>
              <ArrowLeft size={14} aria-hidden="true" /> Earlier
            </Button>
            <Button disabled={scope.step === steps.length - 1} onClick={() => put(moved(steps, scope.step ?? 0, (scope.step ?? 0) + 1), (scope.step ?? 0) + 1)}>
              Later <ArrowRight size={14} aria-hidden="true" />
            </Button>
            <Button onClick={() => put(steps.filter((_, place) => place !== scope.step), WHOLE.step)}>
              <Trash2 size={14} aria-hidden="true" /> Remove step
            </Button>
            <span className="text-sm text-muted">Settings below are those of this step; what is not set is as in the whole file.</span>
          </div>
        </div>
      )}
    </Card>
  );
}

function StepKey({ own, value, isFirst, onChange }: { own: (typeof OWN)[number]; value: unknown; isFirst: boolean; onChange: (value: unknown) => void }) {
  const id = `step-${own.name}`;
  return (
    <div className="min-w-0">
      <label htmlFor={id} className="text-sm font-medium">
        {own.label}
      </label>
      {own.kind === "choice" ? (
        <select id={id} className={inputLook} aria-describedby={`${id}-help`} value={shown(value)} onChange={(event) => onChange(event.target.value || undefined)}>
          <option value="">default: {isFirst ? "file" : "previous"}</option>
          {STARTS.map((each) => (
            <option key={each}>{each}</option>
          ))}
        </select>
      ) : (
        <input id={id} className={inputLook} aria-describedby={`${id}-help`} autoComplete="off" spellCheck={false} defaultValue={shown(value)} onChange={(event) => onChange(parsed({ kind: own.kind, path: false } as FormField, event.target.value))} />
      )}
      <p id={`${id}-help`} className="text-xs text-muted">
        {own.help}
      </p>
    </div>
  );
}
