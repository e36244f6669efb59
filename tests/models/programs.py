"""Owns reading traced programs: their equations, those of inner programs included."""


def equations(jaxpr):
  """Yields every equation of a jaxpr and of the jaxprs inside it."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from equations(inner)


def dots(jaxpr):
  """Returns the dot products of a program."""
  return [e for e in equations(jaxpr) if e.primitive.name == 'dot_general']
