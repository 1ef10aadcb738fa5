"""The paper's tables and figures: what it published, beside what was run here."""
