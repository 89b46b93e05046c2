// A run file as tables, changed without changing the old one.

import type { Document, FormField, Table } from "./types";

/** Value of a dotted key; undefined where it is not set. */
export function valueAt(document: Document, key: string): unknown {
  const [table, name] = split(key);
  if (!table) return document[name];
  const found = document[table];
  return isTable(found) ? found[name] : undefined;
}

/** The document with a key set; without it where the value is undefined. Empty tables go. */
export function withValue(document: Document, key: string, value: unknown): Document {
  const [table, name] = split(key);
  const entry = /^datasets\[(\d+)\]$/.exec(table);
  if (entry) {
    const place = Number(entry[1]);
    return put(document, "datasets", datasetsOf(document).map((each, number) => (number === place ? put(each, name, value) : each)));
  }
  if (!table) return put(document, name, value);
  const found = document[table];
  const changed = put(isTable(found) ? found : {}, name, value);
  return put(document, table, Object.keys(changed).length ? changed : undefined);
}

function put(table: Table, name: string, value: unknown): Table {
  const changed = { ...table };
  if (value === undefined) delete changed[name];
  else changed[name] = value;
  return changed;
}

function split(key: string): [string, string] {
  const at = key.indexOf(".");
  return at < 0 ? ["", key] : [key.slice(0, at), key.slice(at + 1)];
}

export function isTable(value: unknown): value is Table {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Entries of [[datasets]]. */
export function datasetsOf(document: Document): Table[] {
  const found = document.datasets;
  return Array.isArray(found) ? found.filter(isTable) : [];
}

/** What a person typed as a value of a field; an Error where it is none. */
export function parsed(field: FormField, text: string): unknown {
  const trimmed = text.trim();
  if (trimmed === "") return undefined;
  if (field.kind === "whole" || field.kind === "number") {
    const number = Number(trimmed);
    // A share such as 5% is understood by the trainer.
    return Number.isFinite(number) ? number : trimmed;
  }
  if (field.kind === "value") {
    try {
      return JSON.parse(trimmed) ?? undefined;
    } catch {
      return trimmed;
    }
  }
  return trimmed;
}

/** A value as text of a control. */
export function shown(value: unknown): string {
  if (value === undefined || value === null) return "";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** Fields that a search finds: by key, label, other names and help. */
export function matching(fields: FormField[], words: string): FormField[] {
  const wanted = words.toLowerCase().replace(/^-+/, "").trim();
  if (!wanted) return fields;
  const score = (field: FormField): number => {
    const names = [field.key, field.name, ...field.names].map((name) => name.toLowerCase());
    if (names.includes(wanted)) return 0;
    if (names.some((name) => name.includes(wanted.replace(/[\s-]+/g, "_")))) return 1;
    return `${field.label} ${field.help}`.toLowerCase().includes(wanted) ? 2 : 9;
  };
  return fields
    .map((field) => [score(field), field] as const)
    .filter(([place]) => place < 9)
    .sort(([a], [b]) => a - b)
    .map(([, field]) => field);
}
