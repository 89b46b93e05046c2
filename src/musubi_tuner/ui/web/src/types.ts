// What the server answers; the names are those of musubi_tuner/ui (a test compares FormField with its dataclass).

export interface FormField {
  key: string;
  name: string;
  table: string;
  tab: string;
  label: string;
  help: string;
  kind: "switch" | "whole" | "number" | "choice" | "text" | "value";
  unit: string;
  default: unknown;
  required: boolean;
  expert: boolean;
  secret: boolean;
  path: boolean;
  choices: unknown[];
  low: number | null;
  high: number | null;
  step: number | null;
  names: string[];
  families: string[];
  free: boolean;
}

export interface Schema {
  tabs: { name: string; title: string }[];
  fields: FormField[];
  families: { code: string; title: string; defaults: Record<string, unknown> }[];
}

export interface Finding {
  code: string;
  level: "error" | "warning" | "info";
  keys: string[];
  reason: string;
  fix: [string, unknown][];
}

export interface Checked {
  number: number;
  diagnostics: Finding[];
  resolved: Record<string, unknown>;
  idle: string[];
  not_applicable: Record<string, string>;
  title: string;
}

export interface Preview {
  /** Why there is none of the rest. */
  problem: string;
  number: number;
  images: number;
  total: number;
  per_epoch: number;
  epochs: number;
  about: boolean;
  sentence: string;
  buckets: {
    width: number;
    height: number;
    images: number;
    presentations: number;
    batches: number;
    last_batch: number;
    cropped: number;
    enlarged: number;
  }[];
  notes: string[];
  rates: { label: string; steps: number[]; values: number[] }[];
  captions: string[];
}

export interface Run {
  id: string;
  name: string;
  folder: string;
  config: string;
  state: "running" | "stopping" | "stopped" | "finished" | "failed" | "lost";
  exit: { code: number; signal: number | null; message: string | null; ended: number } | null;
  phase: string | null;
  done: number | null;
  total: number | null;
  step: number | null;
  steps: number | null;
  loss: number | null;
  seconds_left: number | null;
  message: string | null;
  started: number | null;
  updated: number | null;
}

export interface Queued {
  number: number;
  name: string;
  state: "waiting" | "started" | "ended";
  run: string | null;
  reason: string;
}

export interface RunDetail extends Run {
  steps_of_file: { name: string; status: string; step: number | null }[];
  samples: { part: string; name: string; path: string; time: number }[];
  checkpoints: { part: string; name: string; step: number; epoch: number; kind: string; model: string; ema: string }[];
  toml: string;
}

export interface Curve {
  steps: number[];
  values: number[];
}

export interface Metrics {
  curves: Record<string, Curve>;
  lost: Record<string, number[]>;
  borders: Record<string, number>;
}

export type Table = Record<string, unknown>;
export type Document = Record<string, unknown>;

/** A data set whose pictures can be shown, or why they cannot. */
export interface OpenedSet {
  id: string;
  name: string;
  folder: string;
  count: number;
  problem: string;
}

/** A picture of a data set. crop: left, top, width and height that are trained, as shares of the picture. */
export interface Picture {
  name: string;
  problem: string;
  size: [number, number] | null;
  bucket: [number, number] | null;
  crop: [number, number, number, number] | null;
  version: number;
  caption: string | null;
  tag: string | null;
  locked: string;
}

export interface Replaced {
  count: number;
  changes: { name: string; before: string; after: string }[];
  undo: number;
  problem: string;
}
