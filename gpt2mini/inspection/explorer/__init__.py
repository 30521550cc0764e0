"""A page to explore a GPT-2 in any browser, without network or server: one HTML file.

The Python here writes it, the JavaScript runs in it; README.md says in which order to read them.
"""

from gpt2mini.inspection.explorer.contents import page_data
from gpt2mini.inspection.explorer.page import WrittenPage, write_page

__all__ = ["WrittenPage", "page_data", "write_page"]
