// The list of data sets: each with the keys that are its own.

import { Plus, Trash2 } from "lucide-react";
import { entriesOf, withValue } from "./document";
import { Field, Findings } from "./field";
import { Button, Card, cn, inputLook } from "./parts";
import type { Document, Finding, FormField, Table } from "./types";

export function Datasets(props: { fields: FormField[]; document: Document; findings: Finding[]; onChange: (document: Document) => void; onFix: (finding: Finding) => void }) {
  const own = props.fields.filter((field) => field.table === "datasets");
  const shared = props.fields.filter((field) => field.table === "general");
  const entries = entriesOf(props.document, "datasets");
  const usual = ["image_directory", "captions_file", "cache_directory", "name"];
  const put = (changed: Table[]) => props.onChange(withValue(props.document, "datasets", changed.length ? changed : undefined));
  return (
    <Card title="Data sets">
      <div className="grid grid-cols-1 gap-3">
        {entries.map((entry, number) => {
          // A setting of [general] can be wrong for this one.
          const wrong = props.findings.map((finding) => finding.keys[0] ?? "").filter((key) => key.startsWith(`datasets[${number}].`));
          const names = [...new Set([...usual, ...Object.keys(entry), ...wrong.map((key) => /\.(\w+)/.exec(key)?.[1] ?? "")])];
          const rest = own.filter((field) => !names.includes(field.name));
          const general = shared.filter((field) => !names.includes(field.name));
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
                  const field = [...own, ...shared].find((each) => each.name === name);
                  if (!field) return null;
                  const key = `datasets[${number}].${name}`;
                  return (
                    <Field
                      key={name}
                      field={{ ...field, key }}
                      value={entry[name]}
                      fallback={field.default}
                      idle={false}
                      findings={props.findings.filter((finding) => finding.keys[0] === key || finding.keys[0]?.startsWith(`${key}.`))}
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
              <Findings findings={props.findings.filter((finding) => finding.keys[0] === `datasets[${number}]`)} onFix={props.onFix} />
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
