import { describe, expect, it } from "vitest";
import { aligned, asCsv, smoothed } from "./chart";
import { isIn, matching, moved, parsed, shown, valueAt, WHOLE, withValue } from "./document";
import type { FormField } from "./types";

const field = (key: string, more: Partial<FormField> = {}): FormField => ({
  key, name: key.split(".")[1] ?? key, table: "", tab: "", label: key, help: "", kind: "text", unit: "", default: null, required: false, expert: false,
  secret: false, path: false, choices: [], low: null, high: null, step: null, names: [], families: [], free: false, own: {}, ...more,
});

describe("a document", () => {
  it("has settings of its data sets by their place", () => {
    const before = { datasets: [{ name: "a" }, { name: "b", keep_tokens: 1 }] };
    expect(withValue(before, "datasets[1].keep_tokens", 2)).toEqual({ datasets: [{ name: "a" }, { name: "b", keep_tokens: 2 }] });
    expect(withValue(before, "datasets[1].keep_tokens", undefined)).toEqual({ datasets: [{ name: "a" }, { name: "b" }] });
    expect(parsed(field("a.b", { kind: "value" }), "null")).toBeUndefined();
  });

  it("is changed without changing the old one, and loses empty tables", () => {
    const before = { run: { name: "a" } };
    const after = withValue(before, "optimizer.lr", 1e-4);
    expect([before, valueAt(after, "optimizer.lr")]).toEqual([{ run: { name: "a" } }, 1e-4]);
    expect(withValue(after, "optimizer.lr", undefined)).toEqual(before);
    expect(valueAt(withValue({}, "schema_version", 1), "schema_version")).toBe(1);
  });

  it("has settings of steps and of roles in them", () => {
    const scope = { step: 1, role: "vae" };
    const before = { steps: [{ name: "a" }, { name: "b" }], optimizer: { lr: 1 } };
    const after = withValue(before, "optimizer.lr", 2, scope);
    expect(after).toEqual({ steps: [{ name: "a" }, { name: "b", roles: { vae: { optimizer: { lr: 2 } } } }], optimizer: { lr: 1 } });
    expect([valueAt(after, "optimizer.lr", scope), valueAt(after, "optimizer.lr")]).toEqual([2, 1]);
    expect(withValue(after, "optimizer.lr", undefined, scope)).toEqual(before);
    expect(withValue({}, "train.max_grad_norm", 1, { step: null, role: "vae" })).toEqual({ roles: { vae: { max_grad_norm: 1 } } });
    const rate = field("optimizer.lr", { table: "optimizer" });
    const data = field("general.resolution", { table: "general" });
    expect([isIn(rate, scope), isIn(data, scope), isIn(data, { step: 1, role: "" }), isIn(data, WHOLE)]).toEqual([true, false, false, true]);
    expect([moved(["a", "b", "c"], 2, 0), moved(["a", "b"], 0, -1)]).toEqual([["c", "a", "b"], ["a", "b"]]);
  });

  it("takes what a person types", () => {
    expect([parsed(field("a.b"), "photo of "), parsed(field("a.b", { path: true }), " x ")]).toEqual(["photo of ", "x"]);
    const number = field("a.b", { kind: "number" });
    expect([parsed(number, "1e-4"), parsed(number, "5%"), parsed(number, " ")]).toEqual([1e-4, "5%", undefined]);
    const list = field("a.c", { kind: "value" });
    expect([parsed(list, "[1, 2]"), parsed(list, "auto"), shown([1, 2])]).toEqual([[1, 2], "auto", "[1, 2]"]);
    expect([parsed(list, '{ "a.*" = 5e-5 }'), parsed(list, '{"a.*": 1}'), parsed(list, "3"), parsed(list, "nan")]).toEqual([{ "a.*": 5e-5 }, { "a.*": 1 }, 3, "nan"]);
    expect([shown({ "a.*": [1], b: "x" }), parsed(field("a.b"), " ")]).toEqual(['{ "a.*" = [1], b = "x" }', " "]);
  });

  it("finds settings by other names first", () => {
    const fields = [field("a.x", { help: "rank of it" }), field("adapter.rank", { names: ["network_dim"] })];
    expect(matching(fields, "--network_dim").map((each) => each.key)).toEqual(["adapter.rank"]);
    expect(matching(fields, "rank").map((each) => each.key)).toEqual(["adapter.rank", "a.x"]);
  });
});

describe("curves", () => {
  it("share their steps", () => {
    expect(aligned([{ steps: [1, 3], values: [5, 6] }, { steps: [2], values: [7] }])).toEqual([[1, 2, 3], [5, null, 6], [null, 7, null]]);
  });

  it("are saved as columns", () => {
    const line = (label: string, steps: number[], values: number[]) => ({ label, metrics: { tags: ["x"], curves: { x: { steps, values } }, lost: {}, borders: {}, starts: [] } });
    expect(asCsv([line("a", [1, 2], [5, 6]), line('b "c"', [2], [7])], "x")).toBe('update,"a","b ""c"""\n1,5,\n2,6,7');
  });

  it("are smoothed, or left", () => {
    expect(smoothed([1, 3], 0)).toEqual([1, 3]);
    expect(smoothed([1, 3], 0.5)).toEqual([1, 2]);
  });
});
