import { setNonce } from "get-nonce";
import { createRoot } from "react-dom/client";
import { App } from "./app";
import "./style.css";

// Style elements that Radix makes at run time carry the nonce of this page.
setNonce(document.querySelector<HTMLMetaElement>('meta[name="csp-nonce"]')?.content ?? "");
const page = document.getElementById("page");
if (page) createRoot(page).render(<App />);
