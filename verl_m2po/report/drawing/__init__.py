"""From numbers to pictures, tables and the page."""
