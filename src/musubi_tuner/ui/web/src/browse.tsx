// Folders of the server's machine, for choosing a path.

import { FolderOpen } from "lucide-react";
import { useState } from "react";
import { get, why } from "./api";
import { Button, Dialog } from "./parts";
import type { Listing } from "./types";

export function Browse({ label, onChoose }: { label: string; onChoose: (path: string) => void }) {
  const [open, setOpen] = useState(false);
  const [found, setFound] = useState<Listing | null>(null);
  const [said, setSaid] = useState("");
  const go = (path: string) =>
    get<Listing>(`folders?path=${encodeURIComponent(path)}`)
      .then((answer) => {
        setFound(answer);
        setSaid("");
      })
      .catch((problem: unknown) => setSaid(why(problem)));
  const choose = (path: string) => {
    setOpen(false);
    onChoose(path);
  };
  return (
    <>
      <Button
        aria-label={`Browse for ${label}`}
        title="Browse"
        onClick={() => {
          setOpen(true);
          void go(found?.path ?? "");
        }}
      >
        <FolderOpen size={16} aria-hidden="true" />
      </Button>
      <Dialog open={open} onOpenChange={setOpen} title={label} about="Files of the machine where the server runs. Other folders than the project's are named with --root.">
        <p role="status" className="text-sm text-bad">
          {said}
        </p>
        {found && (
          <>
            <div className="mb-2 flex flex-wrap items-center gap-2">
              {found.roots.length > 1 &&
                found.roots.map((root) => (
                  <Button key={root} look="bare" onClick={() => void go(root)}>
                    {root === "." ? "project" : root}
                  </Button>
                ))}
              <Button disabled={found.parent === null} onClick={() => void go(found.parent ?? "")}>
                Up
              </Button>
              <code className="min-w-0 flex-1 break-all">{found.path}</code>
              <Button look="main" onClick={() => choose(found.path)}>
                Choose this folder
              </Button>
            </div>
            <ul className="max-h-[50vh] overflow-auto" tabIndex={0} aria-label={`Contents of ${found.path}`}>
              {found.entries.map((entry) => (
                <li key={entry.path}>
                  <button type="button" className="flex min-h-9 w-full items-center justify-between gap-3 px-2 text-left text-sm hover:bg-ground" onClick={() => (entry.folder ? void go(entry.path) : choose(entry.path))}>
                    <span className="min-w-0 break-all">
                      {entry.name}
                      {entry.folder && "/"}
                    </span>
                    {!entry.folder && <span className="text-xs text-muted">{size(entry.size)}</span>}
                  </button>
                </li>
              ))}
            </ul>
            {!found.entries.length && <p className="text-sm text-muted">Nothing in it.</p>}
          </>
        )}
      </Dialog>
    </>
  );
}

function size(bytes: number): string {
  if (bytes < 1024) return `${bytes} B`;
  const units = ["KiB", "MiB", "GiB", "TiB"];
  let [value, place] = [bytes / 1024, 0];
  while (value >= 1024 && place < units.length - 1) [value, place] = [value / 1024, place + 1];
  return `${value.toFixed(1)} ${units[place]}`;
}
