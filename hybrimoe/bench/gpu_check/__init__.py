"""The acceptance kit of an accelerator: `hybrimoe doctor --gpu`. What a card must do before its figures are believed.

`check` runs the sections, each in a process of its own with a time limit; what a section has found is kept when it
fails, hangs or crashes. `report` writes it as Markdown, JSON and one HTML page.
"""
