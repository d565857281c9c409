/* Words of the command line. */
#include "bare.h"

#define MULTIBOOT_HAS_COMMAND_LINE (1u << 2)

struct multiboot {
    u32 flags, lower, upper, device, command_line;
};

const char *command_line = "";

void command_line_of_multiboot(u32 address)
{
    static char copy[1024];
    const struct multiboot *information = (const struct multiboot *)(ulong)address;
    const char *from = (const char *)(ulong)information->command_line;
    u32 length = 0;

    if (!(information->flags & MULTIBOOT_HAS_COMMAND_LINE))
        return;
    while (length < sizeof(copy) - 1 && from[length]) {
        copy[length] = from[length];
        length++;
    }
    command_line = copy;
}

/* Find `key` at the start of a word; return what follows it. */
static const char *find(const char *key)
{
    const char *at = command_line;

    while (*at) {
        const char *k = key;
        while (*k && *at == *k)
            at++, k++;
        if (!*k)
            return at;
        while (*at && *at != ' ')
            at++;
        while (*at == ' ')
            at++;
    }
    return NULL;
}

bool has_word(const char *word)
{
    const char *rest = find(word);
    return rest && (*rest == 0 || *rest == ' ');
}

bool has_key(const char *key)
{
    return find(key) != NULL;
}

bool lists(const char *key, const char *item)
{
    const char *list = find(key);

    while (list && *list && *list != ' ') {
        const char *i = item;
        while (*i && *list == *i)
            list++, i++;
        if (!*i && (*list == ',' || *list == ' ' || *list == 0))
            return true;
        while (*list && *list != ',' && *list != ' ')
            list++;
        if (*list == ',')
            list++;
    }
    return false;
}
