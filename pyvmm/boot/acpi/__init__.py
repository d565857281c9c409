"""ACPI tables for guests that are started without firmware."""
