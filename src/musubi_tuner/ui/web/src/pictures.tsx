// The pictures of the data sets: what is trained of them, their captions, replacing in all captions.

import { useCallback, useEffect, useRef, useState } from "react";
import { Failure, get, send, why } from "./api";
import { Button, Card, cn, Dialog, inputLook } from "./parts";
import type { Document, OpenedSet, Picture, Replaced, TagCount, TokenCount } from "./types";

const PAGE = 48;
const SAVE_AFTER = 800;

export function Pictures({ document, disabled }: { document: Document; disabled: boolean }) {
  const [sets, setSets] = useState<OpenedSet[] | null>(null);
  const [said, setSaid] = useState("");
  const [looks, setLooks] = useState(0);
  const open = () =>
    send<OpenedSet[]>("POST", "datasets", { document })
      .then((found) => {
        setSets(found);
        setLooks((before) => before + 1);
        setSaid("");
      })
      .catch((problem: unknown) => setSaid(why(problem)));
  return (
    <Card title="Pictures and captions">
      <div className="flex flex-wrap items-center gap-2">
        <Button disabled={disabled} onClick={() => void open()}>
          {sets ? "Look again" : "Show the pictures"}
        </Button>
        <p role="status" className="text-sm text-muted">
          {said || (disabled ? "They can be shown once the errors are mended." : "")}
        </p>
      </div>
      {sets?.map((each, number) => (
        <section key={`${looks} ${number}`} className="mt-3" aria-label={`Pictures of ${each.name}`}>
          <h3 className="text-sm font-medium break-words">
            {each.name}: {each.folder}
            {each.id && `, ${each.count} pictures`}
          </h3>
          {each.problem && <p className="text-sm text-bad break-words">{each.problem}</p>}
          {each.id && each.count > 0 && <Grid of={each} document={document} />}
        </section>
      ))}
    </Card>
  );
}

function Grid({ of, document }: { of: OpenedSet; document: Document }) {
  const [offset, setOffset] = useState(0);
  const [items, setItems] = useState<Picture[]>([]);
  const [said, setSaid] = useState("");
  const refresh = useCallback(
    () =>
      void get<Picture[]>(`datasets/${of.id}?offset=${offset}&limit=${PAGE}`)
        .then(setItems)
        .catch((problem: unknown) => setSaid(why(problem))),
    [of.id, offset],
  );
  useEffect(refresh, [refresh]);
  // Counted apart, since the tokenizers have to be opened first; captions that are edited are counted when the page is shown again.
  const [tokens, setTokens] = useState(new Map<string, TokenCount[]>());
  const about = useRef(document);
  useEffect(() => {
    const captioned = items.filter((item) => item.caption);
    if (!captioned.length) return;
    send<TokenCount[][]>("POST", "tokens", { document: about.current, texts: captioned.map((item) => item.caption) })
      .then((counts) => setTokens(new Map(captioned.map((item, number) => [item.name, counts[number] ?? []]))))
      .catch(() => setTokens(new Map()));
  }, [items]);
  const last = Math.min(offset + PAGE, of.count);
  return (
    <>
      <div className="my-2 flex flex-wrap items-center gap-2 text-sm">
        <Button disabled={offset === 0} onClick={() => setOffset(Math.max(0, offset - PAGE))}>
          Previous
        </Button>
        <span>
          {offset + 1} to {last} of {of.count}
        </span>
        <Button disabled={last >= of.count} onClick={() => setOffset(offset + PAGE)}>
          Next
        </Button>
        <ChangeAll of={of} onDone={refresh} />
        <p role="status" aria-live="polite" className="text-muted">
          {said}
        </p>
      </div>
      <ul className="grid grid-cols-1 gap-3 sm:grid-cols-2 lg:grid-cols-3">
        {items.map((item) => (
          <Tile key={`${item.name} ${item.tag}`} at={`datasets/${of.id}`} item={item} tokens={tokens.get(item.name) ?? []} onSaid={setSaid} />
        ))}
      </ul>
    </>
  );
}

/** One picture with the part of it that is trained, and its caption, which is saved a moment after it was typed. */
function Tile({ at, item, tokens, onSaid }: { at: string; item: Picture; tokens: TokenCount[]; onSaid: (text: string) => void }) {
  const [caption, setCaption] = useState(item.caption ?? "");
  const [state, setState] = useState<"" | "not saved" | "saved" | "conflict">("");
  const tag = useRef(item.tag);
  const timer = useRef<ReturnType<typeof setTimeout> | undefined>(undefined);
  const unsaved = useRef<string | null>(null);
  const saving = useRef(false);
  // One after the other: the next one replaces what this one wrote. What could not be saved stays, and is tried again when more is typed.
  const save = useCallback(async () => {
    clearTimeout(timer.current);
    if (saving.current) return;
    saving.current = true;
    try {
      while (unsaved.current !== null) {
        const typed = unsaved.current;
        const answer = await send<{ tag: string }>("PUT", `${at}/caption`, { name: item.name, text: typed, tag: tag.current });
        tag.current = answer.tag;
        if (unsaved.current === typed) unsaved.current = null;
      }
      setState((before) => (before ? "saved" : before));
    } catch (problem) {
      const conflict = problem instanceof Failure && problem.status === 412;
      if (conflict) unsaved.current = null; // it stays in the field, and would only meet the same file again
      setState(conflict ? "conflict" : "not saved");
      onSaid(conflict ? `${item.name}: its caption was changed elsewhere; copy what you typed and look again` : why(problem));
    } finally {
      saving.current = false;
    }
  }, [at, item.name, onSaid]);
  useEffect(() => () => void save(), [save]); // a page that is left saves what was typed
  return (
    <li className="min-w-0 rounded-md border border-line p-2 text-sm">
      <div className="flex h-44 items-center justify-center bg-ground">
        {item.problem ? (
          <p className="p-2 break-words text-bad">{item.problem}</p>
        ) : (
          <div className="relative inline-block">
            <img src={`/api/${at}/thumbnail?name=${encodeURIComponent(item.name)}&v=${item.version}`} alt={item.caption ?? item.name} loading="lazy" className="block max-h-44 max-w-full" />
            {item.crop && (
              <svg className="absolute inset-0 size-full" viewBox="0 0 1 1" preserveAspectRatio="none" aria-hidden="true">
                <rect x={item.crop[0]} y={item.crop[1]} width={item.crop[2]} height={item.crop[3]} fill="none" stroke="#fff" strokeWidth="3" vectorEffect="non-scaling-stroke" />
                <rect x={item.crop[0]} y={item.crop[1]} width={item.crop[2]} height={item.crop[3]} fill="none" stroke="#1d5fa8" strokeWidth="1.5" vectorEffect="non-scaling-stroke" />
              </svg>
            )}
          </div>
        )}
      </div>
      <p className="mt-1 truncate" title={item.name}>
        {item.name}
      </p>
      <p className="text-xs text-muted">
        {item.size && `${item.size[0]}x${item.size[1]}`}
        {item.bucket && `, bucket ${item.bucket[0]}x${item.bucket[1]}`}
        {item.crop && item.crop[2] * item.crop[3] < 0.995 && `, ${((1 - item.crop[2] * item.crop[3]) * 100).toFixed(0)} % cropped`}
      </p>
      {item.locked ? (
        <p className="text-bad">{item.locked}</p>
      ) : (
        <>
          <textarea
            aria-label={`Caption of ${item.name}`}
            className={cn(inputLook, "mt-1")}
            rows={3}
            value={caption}
            placeholder="no caption file"
            aria-invalid={state === "conflict"}
            onBlur={() => void save()}
            onChange={(event) => {
              setCaption(event.target.value);
              setState("not saved");
              unsaved.current = event.target.value;
              clearTimeout(timer.current);
              timer.current = setTimeout(() => void save(), SAVE_AFTER);
            }}
          />
          {tokens.length > 0 && (
            <p className="text-xs text-muted">
              {tokens.map((count, number) => (
                <span key={count.name} className={cn(count.tokens > count.limit && "text-warn")}>
                  {number > 0 && ", "}
                  {count.name} {count.tokens} of {count.limit} tokens{count.tokens > count.limit && ": cut"}
                </span>
              ))}
            </p>
          )}
          <p className={cn("min-h-4 text-xs", state === "conflict" ? "text-bad" : "text-muted")}>{state === "conflict" ? "changed elsewhere" : state}</p>
        </>
      )}
    </li>
  );
}

const WAYS = [
  { how: "replace", label: "Replace a text", finds: true, writes: true },
  { how: "remove tag", label: "Remove a tag", finds: true, writes: false },
  { how: "before", label: "Write before each caption", finds: false, writes: true },
  { how: "after", label: "Write after each caption", finds: false, writes: true },
] as const;

function ChangeAll({ of, onDone }: { of: OpenedSet; onDone: () => void }) {
  const [open, setOpen] = useState(false);
  const [way, setWay] = useState<(typeof WAYS)[number]>(WAYS[0]);
  const [find, setFind] = useState("");
  const [by, setBy] = useState("");
  const [found, setFound] = useState<Replaced | null>(null);
  const [undo, setUndo] = useState(0);
  const [said, setSaid] = useState("");
  const [tags, setTags] = useState<TagCount[]>([]);
  useEffect(() => {
    if (open) void get<TagCount[]>(`datasets/${of.id}/tags`).then(setTags).catch(() => setTags([]));
  }, [of.id, open, undo]);
  const change = (apply: boolean) =>
    send<Replaced>("POST", `datasets/${of.id}/replace`, { how: way.how, find, by, apply })
      .then((answer) => {
        setFound(apply ? null : answer);
        setUndo(answer.undo);
        setSaid(answer.problem || `${answer.count} captions ${apply ? "were changed" : "would change"}.`);
        if (apply) onDone();
      })
      .catch((problem: unknown) => setSaid(why(problem)));
  const back = () =>
    send<{ count: number; kept: string[] }>("POST", `datasets/${of.id}/undo`)
      .then((answer) => {
        setUndo(0);
        setSaid(`${answer.count} captions are as they were.${answer.kept.length ? ` Edited since and left alone: ${answer.kept.join(", ")}` : ""}`);
        onDone();
      })
      .catch((problem: unknown) => setSaid(why(problem)));
  const field = (label: string, value: string, put: (text: string) => void) => (
    <label className="min-w-40 flex-1 text-sm font-medium">
      {label}
      <input
        className={inputLook}
        value={value}
        onChange={(event) => {
          put(event.target.value);
          setFound(null);
        }}
      />
    </label>
  );
  return (
    <>
      <Button onClick={() => setOpen(true)}>Change all captions</Button>
      <Dialog open={open} onOpenChange={setOpen} wide title="Change all captions" about={`Of ${of.name}. Letters count as they are written; the change can be put back until the next one.`}>
        <form
          className="flex flex-wrap items-end gap-2"
          onSubmit={(event) => {
            event.preventDefault();
            void change(false);
          }}
        >
          <label className="text-sm font-medium">
            What to do
            <select
              aria-label="What to do"
              className={inputLook}
              value={way.how}
              onChange={(event) => {
                setWay(WAYS.find((each) => each.how === event.target.value) ?? WAYS[0]);
                setFound(null);
              }}
            >
              {WAYS.map((each) => (
                <option key={each.how} value={each.how}>
                  {each.label}
                </option>
              ))}
            </select>
          </label>
          {way.finds && field(way.writes ? "Find" : "Tag", find, setFind)}
          {way.writes && field(way.finds ? "Replace with" : "Text", by, setBy)}
          <Button type="submit" disabled={way.finds ? !find : !by}>
            Show what changes
          </Button>
          <Button look="main" type="button" disabled={!found?.count} onClick={() => void change(true)}>
            Change
          </Button>
          {undo > 0 && (
            <Button type="button" onClick={() => void back()}>
              Put back
            </Button>
          )}
        </form>
        <p role="status" aria-live="polite" className="mt-2 text-sm">
          {said}
        </p>
        <ul className="mt-2 grid gap-2 text-sm">
          {found?.changes.map((each) => (
            <li key={each.name} className="rounded border border-line p-2 break-words">
              <span className="font-medium">{each.name}</span>
              <span className="block text-muted line-through">{each.before}</span>
              <span className="block">{each.after}</span>
            </li>
          ))}
        </ul>
        {found && found.count > found.changes.length && <p className="text-sm text-muted">and {found.count - found.changes.length} more</p>}
        {tags.length > 0 && (
          <details className="mt-2">
            <summary className="min-h-9 cursor-pointer text-sm font-medium">The most frequent tags</summary>
            <ul className="flex flex-wrap gap-1">
              {tags.map((each) => (
                <li key={each.tag}>
                  <Button className="min-h-6 px-2 text-xs" onClick={() => (setFind(each.tag), setFound(null))}>
                    {each.tag} ({each.count})
                  </Button>
                </li>
              ))}
            </ul>
          </details>
        )}
      </Dialog>
    </>
  );
}
