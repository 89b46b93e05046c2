// A run file as tables, changed without changing the old one.

import { parse } from "smol-toml";
import type { Document, FormField, Table } from "./types";

/** What is edited: the file, one of its steps, and there a role of the family. */
export interface Scope {
  step: number | null;
  role: string;
}

export const WHOLE: Scope = { step: null, role: "" };
const OF_ROLES = ["optimizer", "scheduler", "ema"];
const MAX_GRAD_NORM = "train.max_grad_norm";

/** Whether a setting can be written in a scope. */
export function isIn(field: FormField, scope: Scope): boolean {
  if (scope.role) return OF_ROLES.includes(field.table) || field.key === MAX_GRAD_NORM;
  return scope.step === null || !(["", "general", "datasets"].includes(field.table) || field.key === "model.arch");
}

/** The key under which a scope has a setting, without its step. */
export function keyIn(key: string, scope: Scope): string {
  return scope.role ? `roles.${scope.role}.${key === MAX_GRAD_NORM ? "max_grad_norm" : key}` : key;
}

/** The way to a dotted key; data sets are entries of a list. */
function way(key: string): (string | number)[] {
  return key.split(".").flatMap((part): (string | number)[] => {
    const entry = /^(\w+)\[(\d+)\]$/.exec(part);
    return entry ? [entry[1] ?? "", Number(entry[2])] : [part];
  });
}

function wayIn(key: string, scope: Scope): (string | number)[] {
  return [...(scope.step === null ? [] : ["steps", scope.step]), ...way(keyIn(key, scope))];
}

/** Value of a dotted key; undefined where it is not set. */
export function valueAt(document: Document, key: string, scope: Scope = WHOLE): unknown {
  return wayIn(key, scope).reduce<unknown>(
    (found, part) => (Array.isArray(found) || isTable(found) ? (found as Record<string | number, unknown>)[part] : undefined),
    document,
  );
}

/** The document with a key set; without it where the value is undefined. Tables that this leaves empty go. */
export function withValue(document: Document, key: string, value: unknown, scope: Scope = WHOLE): Document {
  return put(document, wayIn(key, scope), value) as Document;
}

function put(found: unknown, path: (string | number)[], value: unknown): unknown {
  const [part, ...rest] = path;
  if (part === undefined) return value;
  if (typeof part === "number") return (Array.isArray(found) ? found : []).map((each: unknown, place) => (place === part ? (put(each, rest, value) ?? {}) : each));
  const changed: Table = { ...(isTable(found) ? found : {}) };
  const inside = put(changed[part], rest, value);
  if (inside === undefined || (rest.length && isTable(inside) && !Object.keys(inside).length)) delete changed[part];
  else changed[part] = inside;
  return changed;
}

export function isTable(value: unknown): value is Table {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Entries of a list of tables, such as [[datasets]]. */
export function entriesOf(document: Document, name: "datasets" | "steps"): Table[] {
  const found = document[name];
  return Array.isArray(found) ? found.filter(isTable) : [];
}

/** A list with one entry in another place. */
export function moved<T>(list: T[], from: number, to: number): T[] {
  const rest = list.filter((_, place) => place !== from);
  const entry = list[from];
  return entry === undefined || to < 0 || to >= list.length ? list : [...rest.slice(0, to), entry, ...rest.slice(to)];
}

/** What a person typed as a value of a field. */
export function parsed(field: FormField, text: string): unknown {
  const trimmed = text.trim();
  if (field.kind === "text" && !field.path) return text === "" ? undefined : text; // a separator may be a blank
  if (trimmed === "") return undefined;
  if (field.kind === "whole" || field.kind === "number") {
    const number = Number(trimmed);
    // A share such as 5% is understood by the trainer.
    return Number.isFinite(number) ? number : trimmed;
  }
  if (field.kind === "value") {
    const found = read(() => parse(`x = ${trimmed}`).x) ?? read(() => JSON.parse(trimmed) as unknown);
    return found === undefined || (typeof found === "number" && !Number.isFinite(found)) ? trimmed : (found ?? undefined);
  }
  return trimmed;
}

function read(action: () => unknown): unknown {
  try {
    return action();
  } catch {
    return undefined;
  }
}

/** A value as text of a control. */
export function shown(value: unknown): string {
  if (value === undefined || value === null) return "";
  return typeof value === "object" ? inline(value) : String(value);
}

/** A value as TOML on one line. */
function inline(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(inline).join(", ")}]`;
  if (!isTable(value)) return JSON.stringify(value);
  const entries = Object.entries(value).map(([name, each]) => `${/^[\w-]+$/.test(name) ? name : JSON.stringify(name)} = ${inline(each)}`);
  return entries.length ? `{ ${entries.join(", ")} }` : "{}";
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
