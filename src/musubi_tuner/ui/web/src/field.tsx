// One setting: label, control, help, default, what is wrong with it.

import { RotateCcw } from "lucide-react";
import { useEffect, useId, useState } from "react";
import { Browse } from "./browse";
import { parsed, shown } from "./document";
import { Button, cn, inputLook } from "./parts";
import type { Finding, FormField } from "./types";

const ORIGINS: Record<string, string> = { arch: "from the family", preset: "from the preset" };

interface Props {
  field: FormField;
  value: unknown;
  fallback: unknown;
  /** Where the value comes from that is used while none is set; empty = it is the plain default. */
  origin?: string;
  idle: boolean;
  findings: Finding[];
  onChange: (value: unknown) => void;
  onFix: (finding: Finding) => void;
}

export function Field({ field, value, fallback, origin, idle, findings, onChange, onFix }: Props) {
  const id = useId();
  const isSet = value !== undefined;
  const wrong = findings.some((finding) => finding.level === "error");
  const described = `${id}-help${findings.length ? ` ${id}-said` : ""}`;
  const common = { id, "aria-describedby": described, "aria-invalid": wrong || undefined, "aria-required": field.required || undefined };
  return (
    <div className={cn("grid min-w-0 gap-1 rounded-md p-2", wrong && "bg-bad/8", idle && !wrong && "opacity-80")} data-key={field.key}>
      <div className="flex min-w-0 flex-wrap items-baseline justify-between gap-x-2">
        <label htmlFor={id} className="text-sm font-medium">
          {field.label}
          {field.unit && <span className="ml-1 font-normal text-muted">({field.unit})</span>}
          {field.required && <span className="ml-1 text-bad" aria-hidden="true">*</span>}
        </label>
        <span className="flex items-center gap-1">
          {origin && !isSet && <span className="rounded border border-line px-1 text-xs text-muted">{ORIGINS[origin] ?? origin}</span>}
          <code className="text-xs break-all text-muted">{field.key}</code>
          {isSet && (
            <Button look="bare" className="min-h-6 px-1" onClick={() => onChange(undefined)} aria-label={`Reset ${field.key}`} title="Reset to the default">
              <RotateCcw size={14} aria-hidden="true" />
            </Button>
          )}
        </span>
      </div>
      <Control field={field} value={value} fallback={fallback} common={common} onChange={onChange} />
      <p id={`${id}-help`} className="text-xs break-words text-muted">
        {field.help}
        {idle && <em className="ml-1 not-italic">(does nothing with the other settings as they are)</em>}
      </p>
      <Findings id={`${id}-said`} findings={findings} onFix={onFix} />
    </div>
  );
}

/** What was found about a setting. named: with its key, where it stands apart from it. */
export function Findings({ id, findings, named, onFix }: { id?: string; findings: Finding[]; named?: boolean; onFix: (finding: Finding) => void }) {
  if (!findings.length) return null;
  return (
    <ul id={id} className="grid gap-1 text-sm">
      {findings.map((finding, number) => (
        <li key={number} className={cn("break-words", finding.level === "error" ? "text-bad" : finding.level === "warning" ? "text-warn" : "text-muted")}>
          <strong>{finding.level}: </strong>
          {named && finding.keys[0] && <code>{finding.keys[0]} </code>}
          {finding.reason}
          {finding.fix.length > 0 && (
            <Button look="bare" className="min-h-6" onClick={() => onFix(finding)}>
              Apply fix
            </Button>
          )}
        </li>
      ))}
    </ul>
  );
}

type Common = Record<string, unknown>;

function Control({ field, value, fallback, common, onChange }: Pick<Props, "field" | "value" | "fallback" | "onChange"> & { common: Common }) {
  if (field.kind === "switch" || field.kind === "choice") {
    const choices = field.kind === "switch" ? [true, false] : field.choices;
    const words = (choice: unknown) => (choice === true ? "on" : choice === false ? "off" : String(choice));
    const place = value === undefined ? "" : String(choices.findIndex((choice) => choice === value));
    return (
      <select {...common} className={inputLook} value={place} onChange={(event) => onChange(event.target.value === "" ? undefined : choices[Number(event.target.value)])}>
        <option value="">default{fallback === undefined || fallback === null ? "" : `: ${words(fallback)}`}</option>
        {choices.map((choice, number) => (
          <option key={number} value={number}>
            {words(choice)}
          </option>
        ))}
        {place === "-1" && <option value="-1">{shown(value)}</option>}
      </select>
    );
  }
  return <TextControl field={field} value={value} fallback={fallback} common={common} onChange={onChange} />;
}

function TextControl({ field, value, fallback, common, onChange }: Pick<Props, "field" | "value" | "fallback" | "onChange"> & { common: Common }) {
  const [text, setText] = useState(shown(value));
  // A value from elsewhere (a template, a fix) replaces what was typed; one that means the same does not.
  useEffect(() => {
    setText((typed) => (shown(parsed(field, typed)) === shown(value) ? typed : shown(value)));
  }, [field, value]);
  const numeric = field.kind === "whole" || field.kind === "number";
  const input = (
    <input
      {...common}
      className={inputLook}
      type="text"
      inputMode={numeric ? "decimal" : undefined}
      list={field.choices.length ? `${String(common.id)}-list` : undefined}
      autoComplete="off"
      spellCheck={false}
      value={text}
      placeholder={shown(fallback) || (field.required ? "required" : "not set")}
      onChange={(event) => {
        setText(event.target.value);
        onChange(parsed(field, event.target.value));
      }}
    />
  );
  if (field.choices.length)
    return (
      <>
        {input}
        <datalist id={`${String(common.id)}-list`}>
          {field.choices.map((choice) => (
            <option key={String(choice)} value={shown(choice)} />
          ))}
        </datalist>
      </>
    );
  if (!field.path) return input;
  return (
    <div className="flex gap-1">
      {input}
      <Browse label={field.label} onChoose={onChange} />
    </div>
  );
}
