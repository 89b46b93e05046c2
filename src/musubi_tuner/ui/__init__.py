"""The web page's server: settings as a form, runs of this machine, requests to them. It imports no torch."""
