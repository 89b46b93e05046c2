// The page: navigation, theme, the list of runs as it changes.

import { Bell, BellRing, Monitor, Moon, Sun } from "lucide-react";
import { useEffect, useRef, useState } from "react";
import { get, openSession } from "./api";
import { Configure } from "./configure";
import { Button, Card, cn } from "./parts";
import { Compare, QueueCard, RunPage, Runs } from "./runs";
import type { Document, Run, Schema, Started } from "./types";

type View = { at: "configure" } | { at: "runs" } | { at: "run"; id: string } | { at: "compare"; ids: string[] };
const THEME = "musubi-theme";
const THEMES = ["system", "light", "dark"] as const;
type Theme = (typeof THEMES)[number];

function useTheme(): [Theme, (theme: Theme) => void] {
  const [theme, setTheme] = useState<Theme>(() => THEMES.find((each) => each === localStorage.getItem(THEME)) ?? "system");
  useEffect(() => {
    localStorage.setItem(THEME, theme);
    const system = matchMedia("(prefers-color-scheme: dark)");
    const apply = () => document.documentElement.classList.toggle("dark", theme === "dark" || (theme === "system" && system.matches));
    apply();
    system.addEventListener("change", apply);
    return () => system.removeEventListener("change", apply);
  }, [theme]);
  return [theme, setTheme];
}

/** All runs, kept up to date by the server's events. */
function useRuns(ready: boolean): [Run[], boolean] {
  const [runs, setRuns] = useState<Record<string, Run>>({});
  const [connected, setConnected] = useState(true);
  useEffect(() => {
    if (!ready) return;
    const events = new EventSource("/api/events");
    events.addEventListener("open", () => {
      setRuns({});
      setConnected(true);
    });
    events.addEventListener("error", () => setConnected(false));
    events.addEventListener("runs", (event) => {
      const { runs: changed, gone } = JSON.parse((event as MessageEvent<string>).data) as { runs: Run[]; gone: string[] };
      setRuns((before) => {
        const found = { ...before, ...Object.fromEntries(changed.map((run) => [run.id, run])) };
        for (const id of gone) delete found[id];
        return found;
      });
    });
    return () => events.close();
  }, [ready]);
  return [Object.values(runs).sort((a, b) => (b.started ?? 0) - (a.started ?? 0)), connected];
}

const NOTIFY = "musubi-notify";

/** A notification of the browser when a run ends, if it is wanted. */
function Notify({ runs }: { runs: Run[] }) {
  const [wanted, setWanted] = useState(() => localStorage.getItem(NOTIFY) === "yes" && "Notification" in window && Notification.permission === "granted");
  const before = useRef(new Map<string, Run["state"]>());
  useEffect(() => {
    for (const run of runs) {
      const was = before.current.get(run.id);
      const ended = !["running", "stopping"].includes(run.state);
      if (wanted && ended && (was === "running" || was === "stopping")) new Notification(`${run.name}: ${run.state}`, { body: run.exit?.message ?? run.folder });
      before.current.set(run.id, run.state);
    }
  }, [runs, wanted]);
  if (!("Notification" in window)) return null;
  const change = async (on: boolean) => {
    const granted = on && (await Notification.requestPermission()) === "granted";
    localStorage.setItem(NOTIFY, granted ? "yes" : "no");
    setWanted(granted);
  };
  const Icon = wanted ? BellRing : Bell;
  return (
    <Button aria-pressed={wanted} aria-label="Notify me when a run ends" title={wanted ? "You are notified when a run ends" : "Notify me when a run ends"} onClick={() => void change(!wanted)}>
      <Icon size={16} aria-hidden="true" />
    </Button>
  );
}

export function App() {
  const [theme, setTheme] = useTheme();
  const [state, setState] = useState<"opening" | "closed" | "open">("opening");
  const [schema, setSchema] = useState<Schema | null>(null);
  const [view, setView] = useState<View>({ at: "configure" });
  const [given, setGiven] = useState<Document | null>(null);
  const [problem, setProblem] = useState("");
  const [runs, connected] = useRuns(state === "open");

  useEffect(() => {
    openSession()
      .then(async (opened) => {
        if (opened) setSchema(await get<Schema>("schema"));
        setState(opened ? "open" : "closed");
      })
      .catch((error: unknown) => {
        setProblem(error instanceof Error ? error.message : String(error));
        setState("closed");
      });
  }, []);

  useEffect(() => {
    let before = "";
    const onKey = (event: KeyboardEvent) => {
      if (event.ctrlKey || event.metaKey || event.altKey || (event.target instanceof HTMLElement && /INPUT|TEXTAREA|SELECT/.test(event.target.tagName))) return;
      if (before === "g" && event.key === "j") setView({ at: "runs" });
      if (before === "g" && event.key === "c") setView({ at: "configure" });
      before = event.key;
    };
    window.addEventListener("keydown", onKey);
    return () => window.removeEventListener("keydown", onKey);
  }, []);

  const current = view.at === "run" ? runs.find((run) => run.id === view.id) : undefined;
  useEffect(() => {
    document.title = `${current?.name ?? (view.at === "configure" ? "Configure" : "Runs")} · musubi-tinyflux`;
  }, [current?.name, view.at]);

  // A run that has not recorded itself yet is opened once it has.
  const [awaited, setAwaited] = useState<Started | null>(null);
  const started = (run: Started) => {
    setAwaited(run.id ? null : run);
    setView(run.id ? { at: "run", id: run.id } : { at: "runs" });
  };
  const come = awaited && runs.find((run) => run.folder === awaited.folder && run.pid === awaited.pid);
  useEffect(() => {
    if (!come) return;
    setAwaited(null);
    setView({ at: "run", id: come.id });
  }, [come]);
  const link = (name: string, at: "configure" | "runs") => (
    <button
      type="button"
      className={cn("min-h-9 rounded-md px-3 text-sm", (view.at === at || (at === "runs" && view.at !== "configure")) && "bg-ground font-semibold")}
      aria-current={view.at === at ? "page" : undefined}
      onClick={() => setView({ at } as View)}
    >
      {name}
    </button>
  );
  const Icon = { system: Monitor, light: Sun, dark: Moon }[theme];
  return (
    <>
      <header className="border-b border-line bg-panel">
        <div className="mx-auto flex max-w-6xl flex-wrap items-center gap-2 px-4 py-2">
          <strong className="mr-2">musubi-tinyflux</strong>
          <nav aria-label="Main" className="flex gap-1">
            {link("Configure", "configure")}
            {link(`Runs${runs.some((run) => run.state === "running") ? ` (${runs.filter((run) => run.state === "running").length} running)` : ""}`, "runs")}
          </nav>
          <span className="flex-1" />
          {state === "open" && !connected && (
            <span role="alert" className="text-sm text-bad">
              No connection to the server; trying again ...
            </span>
          )}
          {state === "open" && <Notify runs={runs} />}
          <Button onClick={() => setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length] ?? "system")} aria-label={`Theme: ${theme}. Change it`} title={`Theme: ${theme}`}>
            <Icon size={16} aria-hidden="true" />
          </Button>
        </div>
      </header>
      <main className="mx-auto max-w-6xl px-4 py-4">
        {state === "closed" && (
          <Card title="Not open">
            <p className="text-sm">{problem || "Open the page by the address that the program printed; it has a token in it."}</p>
          </Card>
        )}
        {state === "opening" && <p className="text-sm text-muted">opening ...</p>}
        {schema && state === "open" && (
          <>
            <div hidden={view.at !== "configure"}>
              <Configure schema={schema} given={given} active={view.at === "configure"} runs={runs} onStarted={started} />
            </div>
            {view.at === "runs" && (
              <div className="grid grid-cols-1 gap-4">
                {awaited && <p role="status" className="text-sm">A run is starting in {awaited.folder} …</p>}
                <QueueCard runs={runs} />
                <Runs runs={runs} onOpen={(id) => setView({ at: "run", id })} onCompare={(ids) => setView({ at: "compare", ids })} />
              </div>
            )}
            {view.at === "run" &&
              (current ? (
                <RunPage
                  key={current.id}
                  run={current}
                  onBack={() => setView({ at: "runs" })}
                  onStarted={started}
                  onEdit={(document) => {
                    setGiven(document);
                    setView({ at: "configure" });
                  }}
                />
              ) : (
                <p className="text-sm text-muted">waiting for the run ...</p>
              ))}
            {view.at === "compare" && <Compare runs={runs.filter((run) => view.ids.includes(run.id))} onBack={() => setView({ at: "runs" })} />}
          </>
        )}
      </main>
    </>
  );
}
