// Requests to the server of this page.

let mark = "";

export class Failure extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly details: Record<string, unknown> = {},
  ) {
    super(message);
  }
}

/** Exchange the token of the address for a session, or go on with the one there is. */
export async function openSession(): Promise<boolean> {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token) {
    history.replaceState(null, "", location.pathname);
    mark = (await send<{ csrf: string }>("POST", "session", { token })).csrf;
    return true;
  }
  try {
    mark = (await get<{ csrf: string }>("session/current")).csrf;
    return true;
  } catch (problem) {
    if (problem instanceof Failure && problem.status === 401) return false;
    throw problem;
  }
}

async function ask<T>(path: string, init: RequestInit): Promise<T> {
  const answer = await fetch(`/api/${path}`, { credentials: "same-origin", ...init });
  const body: unknown = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    const error = (body as { error?: Record<string, unknown> }).error ?? {};
    throw new Failure(String(error.message ?? answer.statusText), answer.status, error);
  }
  return body as T;
}

export const get = <T>(path: string): Promise<T> => ask<T>(path, {});

export const send = <T>(method: "POST" | "PUT" | "DELETE", path: string, body: unknown = {}): Promise<T> =>
  ask<T>(path, {
    method,
    headers: { "Content-Type": "application/json", "X-CSRF-Token": mark },
    body: JSON.stringify(body),
  });

/** What went wrong, for the person. */
export const why = (problem: unknown): string => (problem instanceof Error ? problem.message : String(problem));
