"""A guest that fuzzes from within, on a real VP."""
