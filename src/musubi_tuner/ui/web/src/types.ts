// What the server answers. server.ts is made from the server's own types: `npm run types`.

import type { components } from "./server";

type S = components["schemas"];
export type { S as Server };
export type FormField = S["FormField"];
export type Schema = S["Schema"];
export type Finding = S["Finding"];
export type Checked = S["Checked"];
export type Preview = S["Preview"];
export type Density = S["Density"];
export type PlanText = S["PlanText"];
export type TokenCount = S["TokenCount"];
export type Difference = S["Difference"];
export type Listing = S["Listing"];
export type Run = S["Run"];
export type RunDetail = S["RunDetail"];
export type Started = S["Started"];
export type Sample = S["Sample"];
export type Queue = S["QueueAnswer"];
export type TagCount = S["TagCount"];
export type Drawing = S["Drawing"];
export type Curve = S["Curve"];
export type Metrics = S["Series"];
export type OpenedSet = S["OpenedSet"];
export type Picture = S["Picture"];
export type Replaced = S["Replaced"];

export type Table = Record<string, unknown>;
export type Document = Record<string, unknown>;
