"""The colors of reports and figures, safe for color-blind readers (after Okabe and Ito)."""

LIGHT = {
    'paper': '#ffffff', 'panel': '#ffffff', 'wash': '#f5f6f8', 'ink': '#16191f',
    'soft': '#5b6472', 'faint': '#98a1ad', 'line': '#e3e6eb', 'grid': '#eef0f3',
    'generalizing': '#0072b2', 'shortcut': '#d55e00', 'middle': '#eceae4',
    'control': '#00795a', 'training': '#5c4b99', 'second': '#b8860b',
}
DARK = {
    'paper': '#0f1217', 'panel': '#161a21', 'wash': '#1b2028', 'ink': '#e9ecf1',
    'soft': '#a4adba', 'faint': '#6f7988', 'line': '#2a313c', 'grid': '#222832',
    'generalizing': '#56b4e9', 'shortcut': '#f0803c', 'middle': '#333740',
    'control': '#2fbf93', 'training': '#a99be0', 'second': '#e0b64a',
}


def css_variables(colors: dict[str, str]) -> str:
  """Returns the palette as CSS custom properties."""
  return ' '.join(f'--{name}: {value};' for name, value in colors.items())
