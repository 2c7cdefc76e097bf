"""The page of `engram-hf explore`: a Gradio app around explorer.py, and the same app as a Space of the Hub."""

import importlib.metadata
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .explorer import Explorer, Refusal


logger = logging.getLogger(__name__)
# An address of this machine only.
THIS_MACHINE = "127.0.0.1"
# Of a run: its checkpoints, and files that name folders of the machine.
NOT_OF_A_SPACE = ("checkpoint-*", "training_args.bin", "trainer_state.json", "optimizer*", ".*")
# Visitors that wait, and those whose last text is kept.
MOST_WAITING, MOST_VISITORS, SECONDS_KEPT = 32, 200, 3600
FIRST_TEXT = """def __init__(self, name):
    self.name = name
    for i, line in enumerate(lines):
        print(line, end="")
"""
CLICKS = """
const send = event => {
  const token = event.target.closest("[data-token]");
  if (token) trigger("click", {token: Number(token.dataset.token)});
};
element.addEventListener("click", send);
element.addEventListener("keydown", event => { if (event.key === "Enter") send(event); });
"""
STYLE = """
.engram-look .t{cursor:pointer !important}
.engram-facts,.engram-next{width:100%;border-collapse:collapse;font-size:14px;margin-bottom:1em;table-layout:fixed}
.engram-facts th,.engram-facts td,.engram-next th,.engram-next td{padding:.2em .6em;border-bottom:1px solid
rgb(128 128 128/.3);text-align:start;vertical-align:top;overflow-wrap:anywhere;white-space:pre-wrap;
unicode-bidi:plaintext}
.engram-facts th{width:38%;font-weight:600}
"""
READ_ME = """---
title: What a memory does to a text
emoji: 🔎
colorFrom: blue
colorTo: yellow
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
---

# What a memory does to a text

This Space loads {model} and shows what its Engram memory does to a text: which n-grams it has looked up, how far the
gates have opened, and what the model would have said without them.

`engram-hf explore --as-space` wrote these files. `engram_hf/` is the package; `requirements.txt` names what it needs.
"""
APP = '''"""Shows what the memory of a model does to a text. `engram-hf explore --as-space` wrote this file."""

from transformers import AutoModelForCausalLM, AutoTokenizer

# Importing the package also makes the Auto classes know the model.
import engram_hf  # noqa: F401
from engram_hf.insight.explorer import Explorer
from engram_hf.insight.page import serve


MODEL = {model!r}

if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(MODEL, device_map={device_map!r})
    # A Space has to be reached from outside of its machine.
    serve(Explorer(model, AutoTokenizer.from_pretrained(MODEL), name={name!r}), host="0.0.0.0", port=7860)
'''


def build_page(explorer: Explorer) -> Any:
    """The page as Gradio's `Blocks`.

    Raises:
        ImportError: Gradio is missing.
    """
    gr: Any = find_gradio()

    def answer(function: Callable[[], Any]) -> Any:
        """What a function gives, or its refusal as a sentence on the page. Other errors go to the log alone."""
        try:
            return function()
        except Refusal as refusal:
            raise gr.Error(str(refusal), print_exception=False) from None
        except Exception as error:
            logger.exception("A request of the page failed.")
            raise gr.Error(
                f"Something went wrong ({type(error).__name__}). The log of the server says what.",
                print_exception=False,
            ) from None

    def look(text: str) -> tuple:
        view = answer(lambda: explorer.look(text))
        return view._repr_html_(), view.trace, "Click a token."

    def details(trace: Any, off: list[str], event) -> str:
        if trace is None:
            raise gr.Error("Look at a text first.", print_exception=False)
        position = event._data.get("token") if isinstance(event._data, dict) else None
        if not isinstance(position, int):
            return gr.skip()
        return answer(lambda: explorer.details(trace, position, off))

    # Gradio hands an event over to a parameter of this type.
    details.__annotations__["event"] = gr.EventData

    def go_on(text: str, off: list[str], new_tokens: float) -> tuple[str, str]:
        return answer(lambda: explorer.continuations(text, off, int(new_tokens)))

    # Requests that use the model take turns, whatever button they come from.
    shared: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
    with gr.Blocks(title=f"engram-hf: {explorer.name}", analytics_enabled=False) as page:
        gr.Markdown(f"# What the memory of {_as_markdown(explorer.name)} does to a text")
        found = gr.State(None, time_to_live=SECONDS_KEPT)
        with gr.Row():
            with gr.Column(scale=3):
                text = gr.Textbox(FIRST_TEXT, label="Text", lines=5, max_lines=12, elem_id="text")
                look_button = gr.Button("Look inside", variant="primary", elem_id="look")
                view = gr.HTML(js_on_load=CLICKS, elem_id="view")
            with gr.Column(scale=2):
                facts = gr.HTML("Look at a text, then click a token.", elem_id="details")
        with gr.Accordion("With and without", open=True):
            off = gr.Dropdown(
                list(explorer.parts()),
                multiselect=True,
                label="Switched off (nothing chosen: the whole memory)",
                elem_id="off",
            )
            new_tokens = gr.Slider(1, explorer.longest_continuation, 40, step=1, label="Tokens to write")
            go_button = gr.Button("Go on with the text", elem_id="go")
            with gr.Row():
                whole = gr.Textbox(label="With the memory", lines=6, max_lines=8, elem_id="with", interactive=False)
                silent = gr.Textbox(
                    label="With these parts switched off", lines=6, max_lines=8, elem_id="without", interactive=False
                )
        look_button.click(look, text, [view, found, facts], **shared)
        view.click(details, [found, off], facts, **shared)
        go_button.click(go_on, [text, off, new_tokens], [whole, silent], **shared)
    return page.queue(max_size=MOST_WAITING)


def serve(
    explorer: Explorer, host: str = THIS_MACHINE, port: int | None = None, *, until_interrupted: bool = True
) -> Any:
    """Open the page.

    Args:
        host: address that it listens on. By default nobody else's machine reaches it.
        port: by default the first one that is free from 7860 on.
        until_interrupted: False returns at once; `close()` of what is returned ends it.

    Raises:
        ImportError: Gradio is missing.
        OSError: the port is taken.
    """
    gr = find_gradio()
    page = build_page(explorer)
    # Fonts of the reader's machine: the page loads nothing from elsewhere.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        theme=theme,
        css=STYLE,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        # The page takes no files.
        max_file_size=1,
        state_session_capacity=MOST_VISITORS,
        prevent_thread_lock=not until_interrupted,
    )
    return page


def write_space(model: str, folder: str | Path, device_map: Any = None) -> list[str]:
    """Write the page as a Space of the Hub: `app.py`, its README, what it needs, and this package.

    Args:
        model: repository of the Hub, or a folder, which is copied.
        folder: empty, or not there yet.
        device_map: as in `from_pretrained`.

    Returns:
        names of what is in the folder.

    Raises:
        FileExistsError: the folder holds something.
        ValueError: the model is neither a folder nor named like a repository, or `folder` lies inside it.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds something already. Name a folder that is empty or new.")
    is_local = Path(model).is_dir()
    if not is_local and model.count("/") != 1:
        raise ValueError(f"{model!r} is neither a folder nor a repository of the Hub, such as 'user/engram-tiny'.")
    if is_local and folder.resolve().is_relative_to(Path(model).resolve()):
        raise ValueError(f"{folder} lies inside {model}, which is copied into it. Name a folder elsewhere.")
    name = Path(model).resolve().name if is_local else model
    folder.mkdir(parents=True, exist_ok=True)
    if is_local:
        shutil.copytree(model, folder / "model", ignore=shutil.ignore_patterns(*NOT_OF_A_SPACE))
    package = Path(__file__).parent.parent
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    version = "6.0.0"
    try:
        version = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        logger.info("Gradio is not installed here, so README.md names the oldest release that the page runs with.")
    app = APP.format(model="model" if is_local else model, name=name, device_map=device_map)
    (folder / "app.py").write_text(app, encoding="utf-8")
    (folder / "README.md").write_text(READ_ME.format(gradio=version, model=f"`{name}`"), encoding="utf-8")
    needed = [line for line in importlib.metadata.requires("engram-hf") or [] if "extra ==" not in line]
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    return sorted(path.name for path in folder.iterdir())


def find_gradio() -> Any:
    """
    Raises:
        ImportError: Gradio is missing.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError("The page needs Gradio: pip install 'engram-hf[explore]'.") from error
    return gradio


def _as_markdown(text: str) -> str:
    return "`" + "".join(each for each in text if each.isprintable() and each not in "`<>") + "`"
