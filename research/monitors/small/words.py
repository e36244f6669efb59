"""Word lists of the small suite."""

NUMBER_WORDS = (
    'zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten',
    'eleven', 'twelve', 'thirteen', 'fourteen', 'fifteen', 'sixteen', 'seventeen', 'eighteen',
    'nineteen', 'twenty')
# Commonest first, about as in English text.
NUMBERS_BY_FREQUENCY = (
    'one', 'two', 'three', 'four', 'five', 'six', 'ten', 'seven', 'eight', 'twenty', 'nine',
    'twelve', 'fifteen', 'eleven', 'eighteen', 'fourteen', 'sixteen', 'thirteen', 'zero',
    'seventeen', 'nineteen')
LETTERS = 'abcdefghijklmnopqrstuvwxyz'

BY_FIRST_LETTER = {
    words.split()[0][0]: tuple(words.split()) for words in (
        'apple arm anchor', 'bread boat bell', 'cat cup candle', 'door dog desk', 'egg ear eagle',
        'fish fire flag', 'goat glass garden', 'hat hand horse', 'ice iron island',
        'jar jacket jewel', 'king key kettle', 'lamp leaf lemon', 'moon milk mouse',
        'nose nest needle', 'oil orange owl', 'pen plate pig', 'queen quilt question',
        'rain rope river', 'sun sand snake', 'tree table train', 'uncle umbrella urn',
        'voice van violin', 'water wall wolf', 'xenon xylophone', 'yard yarn year', 'zoo zebra zone')}

# By length, for counting letters.
SHORT_WORDS = (
    'egg', 'eel', 'bee', 'add', 'all', 'ant', 'arm', 'bag', 'cup', 'dog', 'fly', 'sky', 'wood',
    'book', 'moon', 'tree', 'bell', 'ball', 'door', 'food', 'foot', 'good', 'hill', 'noon', 'roof',
    'seed', 'tall', 'week', 'wall', 'boat', 'farm', 'gold', 'hand', 'lamp', 'milk', 'rain', 'ship',
    'wind', 'apple', 'berry', 'dress', 'floor', 'glass', 'green', 'happy', 'hello', 'level',
    'penny', 'queen', 'sheep', 'sleep', 'sweet', 'truth', 'chair', 'horse', 'plant', 'stone')
LONG_WORDS = (
    'banana', 'pepper', 'cheese', 'papaya', 'eleven', 'freezer', 'degree', 'bubble', 'tattoo',
    'needle', 'beehive', 'reserve', 'canada', 'pajamas', 'sweeter', 'between', 'dresses', 'letter',
    'butter', 'coffee', 'summer', 'dinner', 'bottle', 'school', 'yellow', 'window', 'potato',
    'tomato', 'cotton', 'coconut', 'sausage', 'teacher', 'kitchen', 'picture', 'mountain',
    'elephant', 'umbrella', 'hospital', 'feather', 'weather', 'brother', 'cabbage', 'village',
    'garden', 'winter', 'planet', 'silver', 'orange', 'monkey', 'basket', 'pocket', 'number')

FILM_NOUNS = ('film', 'movie', 'plot', 'acting', 'script', 'ending', 'story', 'scenery')
MEAL_NOUNS = ('soup', 'bread', 'sauce', 'salad', 'pasta', 'cake', 'steak', 'meal')
FILM_FRAMES = ('The {noun} was {word}.', 'We all found the {noun} {word}.',
               'In the end the {noun} is {word}.', 'My friends called the {noun} {word}.')
MEAL_FRAMES = ('The {noun} was {word}.', 'At noon we ate the {word} {noun}.',
               'Their {noun} is always {word}.', 'Last night the {noun} tasted {word}.')
FILM_WORDS = {
    'positive': ('wonderful', 'brilliant', 'delightful', 'moving', 'excellent', 'superb',
                 'charming', 'clever', 'beautiful', 'fantastic'),
    'negative': ('terrible', 'boring', 'awful', 'dull', 'horrible', 'stupid', 'dreadful', 'poor',
                 'ugly', 'disappointing')}
MEAL_WORDS = {
    'positive': ('delicious', 'tasty', 'excellent', 'wonderful', 'perfect', 'lovely', 'superb',
                 'great', 'heavenly', 'amazing'),
    'negative': ('disgusting', 'bland', 'awful', 'horrible', 'terrible', 'burnt', 'stale', 'nasty',
                 'tasteless', 'rotten')}

# Each cue belongs to one topic; the people and times to none.
PEOPLE = ('She', 'He', 'My sister', 'The young man', 'Our neighbor', 'A friend of mine',
          'Her uncle', 'The old lady')
TIMES = ('today', 'on Sunday', 'last week', 'this morning', 'in May', 'once more')
TOPIC_CUES = {
    'sport': ('scored a late goal', 'won the tennis match', 'ran the marathon', 'kicked the ball',
              'joined the hockey team', 'lost the boxing fight', 'trained with the coach',
              'swam in the race'),
    'cooking': ('boiled the potatoes', 'baked an apple pie', 'fried two eggs', 'chopped the onions',
                'stirred the soup', 'roasted a chicken', 'peeled the carrots',
                'seasoned the stew'),
    'music': ('played the violin', 'sang in the choir', 'tuned the piano', 'wrote a new song',
              'joined the orchestra', 'practiced the trumpet', 'hummed a melody',
              'conducted the symphony'),
    'money': ('paid back the loan', 'opened a bank account', 'invested in shares',
              'raised the interest rate', 'sold the company', 'paid the income tax',
              'asked for a mortgage', 'saved ten dollars')}

# Values of a person: of one token each in the tokenizers of OLMo 2 and GPT-NeoX.
NAMES = ('Anna', 'David', 'Peter', 'Maria', 'Thomas', 'Laura', 'Martin', 'Alice', 'Robert', 'Julia',
         'Daniel', 'Helen', 'Simon', 'Emma', 'Victor', 'Clara')
ROLES = ('teacher', 'neighbor', 'boss', 'doctor')
CITIES = ('Paris', 'London', 'Rome', 'Berlin', 'Madrid', 'Moscow', 'Dublin', 'Vienna', 'Cairo',
          'Boston')
INSTRUMENTS = ('piano', 'guitar', 'violin', 'drums', 'organ', 'bass', 'horn', 'keyboard')
PETS = ('dog', 'cat', 'horse', 'rabbit', 'goat', 'snake', 'duck', 'mouse')
DRINKS = ('tea', 'coffee', 'milk', 'water', 'wine', 'beer', 'juice', 'cocoa')

GOODS = (('bat', 'ball'), ('cup', 'spoon'), ('book', 'pen'), ('lamp', 'bulb'), ('coat', 'scarf'),
         ('drum', 'stick'), ('cake', 'candle'), ('bag', 'key'), ('hat', 'ribbon'), ('pot', 'lid'))
MAKERS = (('machines', 'toys'), ('bakers', 'cakes'), ('printers', 'posters'), ('tailors', 'shirts'),
          ('robots', 'clocks'), ('potters', 'vases'), ('weavers', 'rugs'), ('cooks', 'pies'))
SPREADERS = (('moss', 'wall'), ('lilies', 'pond'), ('algae', 'lake'), ('mold', 'bread'),
             ('weeds', 'field'), ('ivy', 'house'), ('rust', 'roof'), ('clover', 'lawn'))
ROWS = (('road', 'lamps'), ('fence', 'posts'), ('path', 'trees'), ('street', 'flags'),
        ('canal', 'benches'), ('bridge', 'pillars'), ('wall', 'hooks'), ('track', 'signs'))
