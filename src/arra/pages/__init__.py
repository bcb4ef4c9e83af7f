"""HTML pages of one look: the frame, tables, pictures and plots that every report is made of."""
