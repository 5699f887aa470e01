"""What each preset adds to the prompt, in words that an edit model follows."""

from __future__ import annotations

from vidgen.contracts import Background, EditParams, Style, Viewpoint

BACKGROUNDS: dict[Background, str] = {
    "studio": "Replace the background with a seamless photo studio backdrop in soft grey, lit by large softboxes.",
    "beach": "Replace the background with a wide sandy beach and a calm turquoise sea under bright daylight.",
    "city": "Replace the background with a lively city street between tall buildings, slightly out of focus.",
    "forest": "Replace the background with a green forest, sunlight falling through the leaves.",
    "mountains": "Replace the background with a wide view of snow-capped mountains in clear, cool air.",
    "night-sky": "Replace the background with a deep night sky full of stars and a faint Milky Way.",
    "office": "Replace the background with a bright modern office with large windows, slightly out of focus.",
    "sunset": "Replace the background with a glowing sunset sky in orange and pink above a low horizon.",
}

STYLES: dict[Style, str] = {
    "cinematic": "Render it as a frame of a feature film: teal and orange grading, shallow depth of field.",
    "film-noir": "Render it as film noir: black and white, hard key light, deep shadows, fine film grain.",
    "golden-hour": "Light it as in the golden hour: low warm sun from one side, long soft shadows, a gentle glow.",
    "moonlight": "Light it by the moon: cool blue night light, dark surroundings, soft silver highlights.",
    "neon": "Light it with neon signs: saturated magenta and cyan light from both sides against a dark scene.",
    "pencil": "Redraw it as a detailed graphite pencil drawing on white paper, with hatched shadows.",
    "sepia": "Tone it as an old sepia photograph: warm brown monochrome, faded blacks, a soft vignette.",
    "vivid": "Make the colours vivid: rich saturation, crisp contrast, bright clean light.",
    "watercolor": "Repaint it as a watercolour on textured paper: loose washes, soft edges, visible brush strokes.",
}

VIEWPOINTS: dict[Viewpoint, str] = {
    "front": "Show the subject from the front, at eye level.",
    "left": "Turn the camera to show the subject from its left side.",
    "right": "Turn the camera to show the subject from its right side.",
    "back": "Turn the camera to show the subject from behind.",
    "above": "Raise the camera to look down at the subject from above.",
    "below": "Lower the camera to look up at the subject from below.",
    "close-up": "Move the camera near for a close-up of the subject's face or main detail.",
    "wide": "Move the camera back for a wide shot with the whole subject and its surroundings.",
}

IDENTITY = (
    "Keep the same subject: the same face, expression, hair, proportions, clothing and details as in the reference "
    "image, and let light and perspective on it match the new scene."
)


def compose(edit: EditParams) -> str:
    """The prompt as the model reads it: the user's words, then the presets' sentences.

    Where the background or the viewpoint changes, a last sentence asks for everything else about the subject to stay.
    """
    parts = []
    if edit.background is not None:
        parts.append(BACKGROUNDS[edit.background])
    if edit.viewpoint is not None:
        parts.append(VIEWPOINTS[edit.viewpoint])
    if edit.style is not None:
        parts.append(STYLES[edit.style])
    if edit.background is not None or edit.viewpoint is not None:
        parts.append(IDENTITY)
    return " ".join([_sentence(edit.prompt), *parts]) if parts else edit.prompt


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", "…")) else f"{text}."
