import tailwindcss from "@tailwindcss/vite";
import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

// The built files are committed and compared, so their names depend on their content alone.
export default defineConfig({
  plugins: [react(), tailwindcss()],
  build: { outDir: "../static", emptyOutDir: true, sourcemap: false, assetsInlineLimit: 0, chunkSizeWarningLimit: 700 },
});
