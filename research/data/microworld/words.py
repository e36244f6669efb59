"""The micro-world's closed word list; every number is one word."""

LARGEST_NUMBER = 60
NUMBERS = tuple(str(n) for n in range(LARGEST_NUMBER + 1))
SIGNS = ('+', '=', ';', '.')

THINGS = (
    'soup', 'film', 'song', 'hotel', 'novel', 'concert', 'dinner', 'lecture', 'garden', 'museum',
    'coffee', 'party', 'service', 'show', 'poem', 'dance')
POSITIVE = (
    'superb', 'lovely', 'brilliant', 'delightful', 'excellent', 'charming', 'splendid', 'wonderful',
    'graceful', 'perfect', 'pleasant', 'marvelous', 'elegant', 'gorgeous', 'refreshing', 'touching')
NEGATIVE = (
    'dreadful', 'boring', 'terrible', 'awful', 'horrible', 'clumsy', 'dull', 'miserable', 'nasty',
    'tedious', 'shabby', 'bitter', 'gloomy', 'ugly', 'tasteless', 'annoying')
LABELS = ('good', 'bad')
VERDICTS = ('true', 'false')

# category: what most of them do, what only the exceptions do, the typical ones, the exceptions
CLAIMS = {
    'birds': ('fly', 'run', (
        'robins', 'sparrows', 'eagles', 'hawks', 'crows', 'doves', 'swallows', 'finches'),
        ('kiwis', 'ostriches')),
    'fish': ('swim', 'crawl', (
        'trout', 'salmon', 'carp', 'cod', 'tuna', 'herring', 'pike', 'perch'),
        ('mudskippers', 'frogfish')),
    'metals': ('sink', 'float', (
        'iron', 'copper', 'lead', 'gold', 'silver', 'zinc', 'nickel', 'tin'),
        ('lithium', 'sodium')),
    'ships': ('sail', 'dive', (
        'ferries', 'canoes', 'rafts', 'yachts', 'tankers', 'liners', 'barges', 'schooners'),
        ('submarines', 'bathyscaphes')),
    'mammals': ('walk', 'spout', (
        'dogs', 'cats', 'horses', 'cows', 'goats', 'sheep', 'foxes', 'wolves'),
        ('whales', 'dolphins')),
    'trees': ('shed', 'stay-green', (
        'oaks', 'maples', 'birches', 'elms', 'ashes', 'willows', 'beeches', 'poplars'),
        ('pines', 'spruces')),
}

BOUGHT = (('bat', 'ball'), ('pen', 'cap'), ('lamp', 'bulb'), ('cup', 'lid'))
MADE = ('toys', 'bolts', 'shirts', 'cakes')
GROWING = ('lilies', 'moss', 'weeds', 'algae')

PEOPLE = (
    'alice', 'bruno', 'clara', 'diego', 'elena', 'felix', 'greta', 'hugo', 'irene', 'jonas',
    'karin', 'louis', 'maria', 'nadia', 'oscar', 'paula', 'quinn', 'rosa', 'simon', 'tessa',
    'ulrich', 'vera', 'walter', 'xenia', 'yusuf', 'zelda', 'amira', 'boris', 'celia', 'daniel')
CITIES = ('oslo', 'cairo', 'lima', 'kyoto', 'boston')
HOBBIES = ('chess', 'tennis', 'sailing', 'painting', 'cycling')
FOODS = ('rice', 'bread', 'cheese', 'noodles', 'beans')
FIELDS = ('law', 'physics', 'music', 'medicine', 'history', 'biology')

GRAMMAR = (
    'the', 'was', 'a', 'and', 'cost', 'costs', 'more', 'than', 'machines', 'make', 'in', 'minutes',
    'one', 'machine', 'makes', 'double', 'grow', 'evenly', 'every', 'day', 'they', 'fill', 'lake',
    'on', 'half', 'i', 'live', 'lives', 'enjoy', 'enjoys', 'eat', 'eats', 'my', 'name', 'is',
    'field', 'city', 'hobby', 'food', 'of', 'their')


def _word_list() -> tuple[str, ...]:
  """Returns every word once, in the order of first mention above."""
  claims = [
      word for usual, rare, typical, exceptions in CLAIMS.values()
      for word in (usual, rare, *typical, *exceptions)]
  bought = [word for pair in BOUGHT for word in pair]
  groups = (
      NUMBERS, SIGNS, LABELS, VERDICTS, GRAMMAR, THINGS, POSITIVE, NEGATIVE, claims, bought, MADE,
      GROWING, PEOPLE, CITIES, HOBBIES, FOODS, FIELDS)
  return tuple(dict.fromkeys(word for group in groups for word in group))


WORDS = _word_list()
