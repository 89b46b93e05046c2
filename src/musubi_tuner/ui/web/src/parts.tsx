// Small parts of the page, in shadcn's manner: native controls or Radix below, Tailwind above.

import { cva, type VariantProps } from "class-variance-authority";
import { clsx, type ClassValue } from "clsx";
import { Dialog as RadixDialog } from "radix-ui";
import { type ComponentProps, type ReactNode, useEffect, useRef, useState } from "react";
import { twMerge } from "tailwind-merge";

export const cn = (...names: ClassValue[]): string => twMerge(clsx(names));

const button = cva(
  "inline-flex min-h-9 items-center justify-center gap-1.5 rounded-md border px-3 text-sm font-medium disabled:cursor-not-allowed disabled:opacity-55",
  {
    variants: {
      look: {
        plain: "border-line bg-panel text-ink enabled:hover:bg-ground",
        main: "border-accent bg-accent text-on-accent enabled:hover:brightness-110",
        bad: "border-bad bg-panel text-bad enabled:hover:bg-ground",
        bare: "border-transparent bg-transparent px-2 text-accent underline-offset-2 hover:underline",
      },
    },
    defaultVariants: { look: "plain" },
  },
);

export function Button({ look, className, ...rest }: ComponentProps<"button"> & VariantProps<typeof button>) {
  return <button type="button" className={cn(button({ look }), className)} {...rest} />;
}

export function Card({ title, children, className }: { title?: ReactNode; children: ReactNode; className?: string }) {
  return (
    <section className={cn("min-w-0 rounded-lg border border-line bg-panel p-4", className)}>
      {title && <h2 className="mb-3 text-base font-semibold">{title}</h2>}
      {children}
    </section>
  );
}

const LOOKS: Record<string, string> = {
  running: "text-accent", stopping: "text-warn", finished: "text-good", stopped: "text-muted", failed: "text-bad", lost: "text-bad",
  error: "text-bad", warning: "text-warn", info: "text-muted",
};

export function Badge({ of, children }: { of: string; children: ReactNode }) {
  return (
    <span className={cn("inline-flex items-center rounded-full border border-current px-2 py-0.5 text-xs font-medium", LOOKS[of])}>
      {children}
    </span>
  );
}

export const inputLook =
  "min-h-9 w-full rounded-md border border-line bg-panel px-2.5 py-1.5 text-sm text-ink placeholder:text-muted aria-invalid:border-bad";

export function Dialog(props: { open: boolean; onOpenChange: (open: boolean) => void; title: string; about?: string; wide?: boolean; children: ReactNode }) {
  return (
    <RadixDialog.Root open={props.open} onOpenChange={props.onOpenChange}>
      <RadixDialog.Portal>
        <RadixDialog.Overlay className="fixed inset-0 z-40 bg-black/50" />
        <RadixDialog.Content className={cn("fixed top-1/2 left-1/2 z-50 max-h-[85vh] -translate-x-1/2 -translate-y-1/2 overflow-auto rounded-lg border border-line bg-panel p-5", props.wide ? "w-[min(68rem,94vw)]" : "w-[min(46rem,94vw)]")}>
          <RadixDialog.Title className="text-lg font-semibold">{props.title}</RadixDialog.Title>
          <RadixDialog.Description className="mb-3 text-sm text-muted">{props.about ?? ""}</RadixDialog.Description>
          {props.children}
        </RadixDialog.Content>
      </RadixDialog.Portal>
    </RadixDialog.Root>
  );
}

/** A table of plain values; wider ones scroll in themselves. */
export function Rows({ heads, rows }: { heads: string[]; rows: ReactNode[][] }) {
  const look = "border-b border-line py-1 pr-3";
  return (
    <div className="overflow-x-auto">
      <table className="w-full text-left text-sm">
        <thead>
          <tr>
            {heads.map((head) => (
              <th key={head} className={cn(look, "font-medium")}>
                {head}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map((row, number) => (
            <tr key={number}>
              {row.map((value, place) => (
                <td key={place} className={look}>
                  {value}
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

export function time(seconds: number | null | undefined): string {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "";
  const whole = Math.max(0, Math.round(seconds));
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60)];
  return hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

/** What a request answers, asked again when the version changes: one at a time, so that slow answers neither pile up nor come late. */
export function useFresh<T>(ask: () => Promise<T>, version: string): { value: T | null; problem: string } {
  const [value, setValue] = useState<T | null>(null);
  const [problem, setProblem] = useState("");
  const latest = useRef(ask);
  const state = useRef({ busy: false, wanted: false, ended: false });
  latest.current = ask;
  useEffect(() => {
    state.current.ended = false;
    return () => void (state.current.ended = true);
  }, []);
  useEffect(() => {
    const run = async (): Promise<void> => {
      const now = state.current;
      now.wanted = true;
      if (now.busy) return;
      now.busy = true;
      while (now.wanted && !now.ended) {
        now.wanted = false;
        const asked = latest.current;
        try {
          const found = await asked();
          if (!now.ended && asked === latest.current) setValue(() => found);
          if (asked !== latest.current) now.wanted = true;
          setProblem("");
        } catch (reason) {
          setProblem(reason instanceof Error ? reason.message : String(reason));
        }
      }
      now.busy = false;
    };
    void run();
  }, [version]);
  return { value, problem };
}

/** Of several changes within the time, the last one. */
export function useLater(action: () => void, wait: number, watched: unknown): void {
  const latest = useRef(action);
  latest.current = action;
  useEffect(() => {
    const timer = setTimeout(() => latest.current(), wait);
    return () => clearTimeout(timer);
  }, [wait, watched]);
}

/** Give the person a file. */
export function save(name: string, content: Blob): void {
  const link = window.document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}
