"""What an exported student is used with: `predict` for files, `serve` for a product that asks over HTTP."""
