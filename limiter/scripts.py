"""What Redis decides: one script per decision, because Redis runs nothing else meanwhile.

Every script reads Redis's clock, so the workers' clocks may differ. ``KEYS`` begin with what each decision about a
mailbox needs (`HEAD`), and go on with windows; ``ARGV`` begins with what the settings say of concurrency and of the
ramp. What they say of these windows (`Window.described`) is one argument, for each costs more than to take it apart.
What is the same in every call comes before what is not, for it is packed once.

Numbers are Lua's, exact up to 2**53: none that is handed in is more than half of that. A name stands for what refuses:
a budget, ``concurrency``, ``pause`` or ``tenant_pause``; none admits, and ``emptied`` says that the counts are lost.
"""

#: The names of the first keys, in order. ``born`` is the run of Redis that holds the counts; the fleet's and the
#: mailbox's own limits are hashes by budget, as is what was slowed: "limit:at:whole:strikes".
HEAD = ("born", "fleet_limits", "own_limits", "slowed", "pause", "tenant_pause", "slots", "waiting_send", "waiting")

#: Milliseconds in which a limit that was lowered to nothing would be whole again.
RECOVERY_MS = 30 * 60 * 1000

_CLOCK = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
"""

_HEAD = _CLOCK + f"local key = {{{', '.join(f'{name} = KEYS[{i}]' for i, name in enumerate(HEAD, 1))}}}\n"

_IS_WHOLE = """
-- A Redis that was started anew may have come up with what it knew some while ago.
local function is_whole(born)
  local filled = redis.call('GET', born)
  return filled and filled == redis.call('INFO', 'server'):match('run_id:(%x+)')
end
"""

_WINDOW = """
-- A window's use now, and the fields of the sub-windows that have left it since it was last charged.
local function read(key, width, ring)
  local stored = redis.call('HMGET', key, 'used', 'last')
  local used, current = tonumber(stored[1] or 0), math.floor(now / width)
  local last = tonumber(stored[2] or current)
  current = math.max(current, last) -- a clock that was set back must not free anything
  local began = not stored[2] or current > last
  local left = {}
  for i = last + 1, math.min(current, last + ring) do left[#left + 1] = i % ring end
  if #left > 0 then
    for _, units in ipairs(redis.call('HMGET', key, unpack(left))) do used = used - tonumber(units or 0) end
  end
  return {
    key = key, width = width, ring = ring, last = last, current = current, began = began, used = used, left = left,
    granted = 0
  }
end

-- Milliseconds until so many of the used units have left the window.
local function frees(window, units)
  if not window.parts then
    local stored = redis.call('HGETALL', window.key)
    window.parts = {}
    for i = 1, #stored, 2 do window.parts[tonumber(stored[i]) or stored[i]] = tonumber(stored[i + 1]) end
  end
  for i = window.current - window.ring + 1, window.last do
    units = units - (window.parts[i % window.ring] or 0)
    if units <= 0 then return (i + window.ring) * window.width - now end
  end
  return window.ring * window.width
end

local function charge(window, units)
  if #window.left > 0 then redis.call('HDEL', window.key, unpack(window.left)) end
  redis.call('HINCRBY', window.key, window.current % window.ring, units)
  redis.call('HSET', window.key, 'used', window.used + units, 'last', window.current)
  if window.began then redis.call('PEXPIRE', window.key, (window.ring + 1) * window.width) end
end

local function counted(window, i)
  if i > window.last or i <= window.current - window.ring then return 0 end
  return tonumber(redis.call('HGET', window.key, i % window.ring) or 0)
end

-- The sub-window in which so many units were charged at an instant. What was written down after a loss is rounded to
-- the younger one.
local function charged_in(window, units, at)
  local i = math.floor(at / window.width)
  local in_ring = i > window.current - window.ring
  if in_ring and counted(window, i) < units and counted(window, i + 1) >= units then return i + 1 end
  return i
end

-- Units that were charged together with an instant and are in the window still.
local function charged_at(window, units, at) return counted(window, charged_in(window, units, at)) end

-- Takes back what was charged at an instant, as far as it is in the window still.
local function take_back(window, units, at)
  local i = charged_in(window, units, at)
  units = math.min(units, counted(window, i))
  if units <= 0 then return end
  redis.call('HINCRBY', window.key, i % window.ring, -units)
  redis.call('HINCRBY', window.key, 'used', -units)
end
"""

_LIMITS = """
local function hash(name)
  local stored, found = redis.call('HGETALL', name), {}
  for i = 1, #stored, 2 do found[stored[i]] = stored[i + 1] end
  return found
end
local fleet, own, slowed = hash(key.fleet_limits), hash(key.own_limits), hash(key.slowed)

-- The limit that counts now, the one that is set, and who set it: 0 the settings, 1 the fleet's, 2 the mailbox's.
local function limit_of(budget, default)
  local set, by = default, 0
  if fleet[budget] then set, by = tonumber(fleet[budget]), 1 end
  if own[budget] then set, by = tonumber(own[budget]), 2 end
  if slowed[budget] then
    local limit, at, whole = slowed[budget]:match('^(%d+):(%d+):(%d+):')
    local grown = limit + math.floor(whole * math.max(now - at, 0) / RECOVERY)
    if grown < tonumber(whole) and (set == 0 or grown < set) then return grown, set, by end
  end
  return set, set, by
end

local concurrency, concurrency_set, concurrency_by = limit_of('concurrency', tonumber(ARGV[1]))
local pauses = redis.call('MGET', key.pause, key.tenant_pause)

-- Slots that may be held now: after a pause one, then two, four … until the limit.
local function concurrency_now()
  local slots = concurrency
  for _, pause in ipairs(pauses) do
    local ends = tonumber(pause or 0)
    if ends > now then return 0 end
    if ends > 0 then slots = math.min(slots, 2 ^ math.floor((now - ends) / tonumber(ARGV[2]))) end
  end
  return slots
end
""".replace("RECOVERY", str(RECOVERY_MS))

_WINDOWS = """
local windows = {}
for budget, limit, width, ring, units in ARGUMENT:gmatch('(%S+) (%d+) (%d+) (%d+) (%d+)') do
  local window = read(KEYS[#windows + FIRST], tonumber(width), tonumber(ring))
  window.budget, window.units = budget, tonumber(units)
  window.limit, window.set, window.by = limit_of(budget, tonumber(limit))
  windows[#windows + 1] = window
end
""".replace("FIRST", str(len(HEAD) + 1))


def _windows_in(argument: int) -> str:
    return _WINDOWS.replace("ARGUMENT", f"ARGV[{argument}]")


_REFUSALS = """
-- What refuses for longest, its wait, 1 if nothing is left of it, and its limit if that is too low as a whole.
local refusal = {'', 0, 0, 0}
local function refuse(by, wait, nothing_left)
  -- A refusal stands whatever its wait: an error in a wait must not admit anything.
  if wait > refusal[2] or refusal[1] == '' then refusal = {by, wait, nothing_left, 0} end
end
for i, name in ipairs({'pause', 'tenant_pause'}) do
  local ends = tonumber(pauses[i] or 0)
  if ends > now then refuse(name, ends - now, 1) end
end

-- Says whether the units are more than the whole of what was set; one that was lowered grows.
local function never_fits(window, units) return window.set > 0 and units > window.set end

local function refuse_excess(window, units)
  local used = window.used + window.granted
  local excess = used + units - window.limit
  if window.limit > 0 and excess > 0 then
    refuse(window.budget, frees(window, excess), used >= window.limit and 1 or 0)
  end
end
"""

_SLOTS = """
local function held() return redis.call('ZCOUNT', key.slots, '(' .. now, '+inf') end

local function hold(token, lease)
  redis.call('ZADD', key.slots, now + lease, token) -- first, for a full Redis refuses a script's first write only
  redis.call('ZREMRANGEBYSCORE', key.slots, '-inf', now)
  redis.call('PEXPIRE', key.slots, math.max(lease, redis.call('PTTL', key.slots)))
end

local function anyone_waits() return redis.call('EXISTS', key.waiting_send, key.waiting) > 0 end

-- Gives what is free to those that wait, sends first. What wakes one is a list of one.
local function hand_over(concurrency, lease, woken)
  for _, waiting in ipairs({key.waiting_send, key.waiting}) do
    redis.call('ZREMRANGEBYSCORE', waiting, '-inf', now)
    while held() < concurrency do
      local first = redis.call('ZPOPMIN', waiting)[1]
      if not first then break end
      hold(first, lease)
      redis.call('RPUSH', woken .. first, 1)
      redis.call('PEXPIRE', woken .. first, lease)
    end
  end
end
"""

#: ARGV: concurrency, ramp step, lease, slot retry, lease of a slot that is handed over, the prefix of the counts of
#: mailboxes that talk, that of what wakes a waiting call, windows, token, wait, 1 for a send, when budget was reserved
#: (0: it was not).
#: Returns a refusal, or for its wait the instant.
ADMIT = (
    _HEAD
    + _IS_WHOLE
    + """
if not is_whole(key.born) then return {'emptied', 0, 1, 0} end
"""
    + _WINDOW
    + _LIMITS
    + _windows_in(8)
    + _REFUSALS
    + _SLOTS
    + """
local token, wait, reserved_at = ARGV[9], tonumber(ARGV[10]), tonumber(ARGV[12])
local waiting = ARGV[11] == '1' and key.waiting_send or key.waiting
local reservable = {sends = true, recipients = true, tenant_external_recipients = true}

for _, window in ipairs(windows) do
  if never_fits(window, window.units) then return {window.budget, 0, 0, window.set} end
  window.moves = reserved_at > 0 and reservable[window.budget]
    and charged_at(window, window.units, reserved_at) >= window.units
  -- What was reserved counts already.
  if not window.moves then refuse_excess(window, window.units) end
end

-- Nothing but a slot may be waited for, so the slots are looked at when nothing else refuses.
local waits = anyone_waits()
if refusal[1] == '' and concurrency > 0 then
  local slots = concurrency_now()
  if waits then hand_over(slots, tonumber(ARGV[5]), ARGV[7]) end
  local handed_over = tonumber(redis.call('ZSCORE', key.slots, token) or 0) > now
  if not handed_over and held() >= slots then
    refuse('concurrency', tonumber(ARGV[4]), 1)
    if wait > 0 then
      redis.call('ZADD', waiting, 'NX', now + wait, token)
      redis.call('PEXPIRE', waiting, math.max(wait, redis.call('PTTL', waiting)))
    end
  end
end
if refusal[1] ~= '' then return refusal end

hold(token, tonumber(ARGV[3]))
if waits then redis.call('ZREM', waiting, token) end
for _, window in ipairs(windows) do
  charge(window, window.units)
  if window.moves then take_back(window, window.units, reserved_at) end
end
local talking = ARGV[6] .. math.floor(now / 10000)
if redis.call('PFADD', talking, key.slots) == 1 then redis.call('PEXPIRE', talking, 30000) end
return {'', now, 0, 0}
"""
)

#: ARGV: concurrency, ramp step, lease of a slot that is handed over, the prefix of what wakes a waiting call, token.
#: Returns a slot, or ends the wait for one, and hands on what is free.
RELEASE = (
    _HEAD
    + _SLOTS
    + """
redis.call('ZREM', key.slots, ARGV[5])
if not anyone_waits() then return end
redis.call('ZREM', key.waiting_send, ARGV[5])
redis.call('ZREM', key.waiting, ARGV[5])
"""
    + _LIMITS
    + """
hand_over(concurrency_now(), tonumber(ARGV[3]), ARGV[4])
"""
)

#: ARGV: lease, then tokens. Has slots held, without asking.
HOLD = (
    _HEAD
    + _SLOTS
    + """
for i = 2, #ARGV do hold(ARGV[i], tonumber(ARGV[1])) end
"""
)

#: ARGV: concurrency, ramp step, windows, whose units say what is counted of an email: 0 nothing, it must only not be
#: used up, 1 the send, 2 its recipients, 3 those that are external; then recipients and external ones of each email.
#: Returns the instant (-1: the counts are lost), then a refusal for each email. `WHOLE` has looked at the run of Redis
#: before, on the same connection.
RESERVE = (
    _HEAD
    + """
if redis.call('EXISTS', key.born) == 0 then return {-1} end
"""
    + _WINDOW
    + _LIMITS
    + _windows_in(3)
    + _REFUSALS
    + """
local paused, answer = refusal, {now}
for recipients, external in ARGV[4]:gmatch('(%d+) (%d+)') do
  local asked = {[0] = 0, 1, tonumber(recipients), tonumber(external)}
  refusal = paused
  for _, window in ipairs(windows) do
    local units = asked[window.units]
    if never_fits(window, units) then
      refusal = {window.budget, 0, 0, window.set}
      break
    end
    local needed = window.units == 0 and 1 or units
    if needed > 0 then refuse_excess(window, needed) end
  end
  if refusal[1] == '' then
    for _, window in ipairs(windows) do window.granted = window.granted + asked[window.units] end
  end
  answer[#answer + 1] = refusal
end
for _, window in ipairs(windows) do
  if window.granted > 0 then charge(window, window.granted) end
end
return answer
"""
)

#: KEYS: windows. ARGV: the instant of the reservation, then width, ring and units of each.
REFUND = (
    _CLOCK
    + _WINDOW
    + """
for i = 1, #KEYS do
  local window = read(KEYS[i], tonumber(ARGV[3 * i - 1]), tonumber(ARGV[3 * i]))
  take_back(window, tonumber(ARGV[3 * i + 1]), tonumber(ARGV[1]))
end
"""
)

#: ARGV: concurrency, ramp step, windows.
#: Returns for the slots and each window: the limit, what is used, milliseconds until a part of it comes back (-1:
#: nothing is used) and until all of it is, the limit that is set, who set it, and how it was slowed.
USAGE = (
    _HEAD
    + _WINDOW
    + _LIMITS
    + _windows_in(3)
    + _SLOTS
    + """
local first = redis.call('ZRANGEBYSCORE', key.slots, '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
local free = first[2] and first[2] - now or -1
local answer = {{concurrency, held(), free, -1, concurrency_set, concurrency_by, slowed['concurrency'] or ''}}
for _, window in ipairs(windows) do
  local first_free, all_free = -1, -1
  if window.used > 0 then first_free, all_free = frees(window, 1), frees(window, window.used) end
  answer[#answer + 1] = {
    window.limit, window.used, first_free, all_free, window.set, window.by, slowed[window.budget] or ''
  }
end
return answer
"""
)

#: KEYS: a pause. ARGV: milliseconds, 1 if they count from now (else from 1970), how long the ramp is remembered.
#: Returns when the pause ends. A longer pause that is already there stands.
PAUSE = (
    _CLOCK
    + """
local ends = tonumber(ARGV[1])
if ARGV[2] == '1' then ends = now + ends end
ends = math.max(ends, tonumber(redis.call('GET', KEYS[1]) or 0))
if ends > now then redis.call('SET', KEYS[1], ends, 'PX', ends - now + ARGV[3]) end
return ends
"""
)

#: KEYS: pauses. Returns when the last of them ends, or nil when none is on.
PAUSED = (
    _CLOCK
    + """
local ends = 0
for _, pause in ipairs(KEYS) do ends = math.max(ends, tonumber(redis.call('GET', pause) or 0)) end
return ends > now and ends or nil
"""
)

#: Counts what Graph throttled; KEYS go on with the strikes, each "at:wait:used", and the window of the budget.
#: ARGV: concurrency, ramp step, budget, its limit, width and ring (0: the slots), strikes that slow, how long they are
#: remembered, what is left of the limit in percent, the least in percent, the prefix of the counts of mailboxes that
#: talk, that of those that were throttled, how many throttled ones make it the tenant's, for how long Graph wants to be
#: left alone, how long the ramp is remembered.
#: Pauses the mailbox, or everything; returns "limit:at:whole:strikes" if it was slowed, and 1 if it is the tenant's.
THROTTLED = (
    _HEAD
    + _WINDOW
    + _LIMITS
    + _SLOTS
    + """
local throttled = ARGV[12] .. math.floor(now / 10000)
redis.call('PFADD', throttled, key.slots)
redis.call('PEXPIRE', throttled, 30000)
local function lately(prefix)
  return redis.call('PFCOUNT', prefix .. math.floor(now / 10000), prefix .. (math.floor(now / 10000) - 1))
end
local many = lately(ARGV[12])
local tenants = many >= tonumber(ARGV[13]) and 2 * many >= lately(ARGV[11])

-- Pauses, and says whether it was paused before.
local function pause(name)
  local before = tonumber(redis.call('GET', name) or 0)
  local ends = math.max(now + ARGV[14], before)
  redis.call('SET', name, ends, 'PX', ends - now + ARGV[15])
  return before > now
end
local was_paused = tonumber(pauses[2] or 0) > now
was_paused = pause(key.pause) or was_paused
if tenants then pause(key.tenant_pause) end

-- Calls that were under way together are throttled together: they count once. The tenant's matter is not the mailbox's.
if was_paused or tenants then return {'', tenants and 1 or 0} end
local strikes, needed = KEYS[10], tonumber(ARGV[7])
local budget, ring = ARGV[3], tonumber(ARGV[6])
-- The call that was throttled has returned its slot.
local used = ring > 0 and read(KEYS[11], tonumber(ARGV[5]), ring).used or held() + 1
redis.call('RPUSH', strikes, string.format('%d:%d:%d', now, ARGV[14], used))
redis.call('LTRIM', strikes, -needed, -1)
redis.call('PEXPIRE', strikes, ARGV[8] + ARGV[14])
local seen = redis.call('LRANGE', strikes, 0, -1)
-- What they are apart is time in which something was sent: a pause may be longer than they are remembered.
local apart = now - seen[1]:match('^%d+')
for i = 1, #seen - 1 do apart = apart - seen[i]:match(':(%d+):') end
if #seen < needed or apart > tonumber(ARGV[8]) then return {'', 0} end

redis.call('DEL', strikes)
local limit, set = limit_of(budget, tonumber(ARGV[4]))
-- What it took to be throttled was used before the first pause; since then the window has emptied.
for _, strike in ipairs(seen) do used = math.max(used, tonumber(strike:match('%d+$'))) end
if used == 0 then used = math.max(limit, 1) end
local whole = set
if set == 0 then whole = limit > 0 and tonumber(slowed[budget]:match('^%d+:%d+:(%d+):')) or used end
local lowered = math.floor((limit > 0 and math.min(limit, used) or used) * ARGV[9] / 100)
lowered = math.max(lowered, math.floor(whole * ARGV[10] / 100), 1)
if lowered >= whole then return {'', 0} end
local record = string.format('%d:%d:%d:%d', lowered, now, whole, needed)
redis.call('HSET', key.slowed, budget, record)
redis.call('PEXPIRE', key.slowed, RECOVERY)
return {record, 0}
""".replace("RECOVERY", str(RECOVERY_MS))
)

#: KEYS: `born`. Returns 1 if the counts are whole. If not, that is all that the next scripts have to look at.
WHOLE = (
    _IS_WHOLE
    + """
if is_whole(KEYS[1]) then return 1 end
redis.call('DEL', KEYS[1])
return 0
"""
)

#: KEYS: `born` and the turn of restoring. ARGV: a token, for how long.
#: Returns the run of Redis that is to be filled, or nil if another is at it or has done it.
RESTORE = (
    _IS_WHOLE
    + """
if is_whole(KEYS[1]) or not redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2]) then return nil end
redis.call('DEL', KEYS[1])
return redis.call('INFO', 'server'):match('run_id:(%x+)')
"""
)

#: KEYS: `born` and the turn of restoring. ARGV: the token, the run that was filled. Nothing if the turn was lost.
RESTORED = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('DEL', KEYS[2])
return 1
"""

#: KEYS: a turn. ARGV: its token.
END_TURN = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""

#: KEYS: `born` and a window. ARGV: width, ring, then age in milliseconds and units of each part. Safe to repeat.
#: Nothing if the counts are whole: a process that stood still must not undo what was charged since.
SPENT = (
    _CLOCK
    + """
if redis.call('EXISTS', KEYS[1]) == 1 then return end
local width, ring = tonumber(ARGV[1]), tonumber(ARGV[2])
local current, used = math.floor(now / width), 0
redis.call('DEL', KEYS[2])
for i = 3, #ARGV, 2 do
  local at, units = math.floor((now - ARGV[i]) / width), tonumber(ARGV[i + 1])
  if at > current - ring then
    redis.call('HINCRBY', KEYS[2], at % ring, units)
    used = used + units
  end
end
redis.call('HSET', KEYS[2], 'used', used, 'last', current)
redis.call('PEXPIRE', KEYS[2], (ring + 1) * width)
"""
)
